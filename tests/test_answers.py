"""What is answered at once on meta tensors: shapes, dtypes and strides are those torch gives."""

import pytest
import torch
from torch import nn

from attnsurgeon import answers
from attnsurgeon.answers import AnswersAtOnce

ASKED = [
    (nn.BatchNorm2d(4), (2, 4, 5, 6)),
    (nn.BatchNorm2d(4, affine=False), (2, 4, 5, 6)),
    (nn.BatchNorm2d(4, track_running_stats=False), (2, 4, 5, 6)),
    (nn.BatchNorm1d(4), (2, 4)),
    (nn.BatchNorm3d(4), (1, 4, 2, 3, 5)),
    (nn.LayerNorm(6), (2, 5, 6)),
    (nn.LayerNorm((5, 6), elementwise_affine=False), (2, 5, 6)),
    (nn.LayerNorm(6, bias=False), (3, 6)),
]


def described(norm, x):
    with torch.no_grad():
        out = norm(x)
    return out.shape, out.dtype, out.stride(), out.device


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("norm", "shape"), ASKED)
def test_the_answer_is_that_of_torch(norm, shape, dtype, training):
    norm = norm.to("meta").train(training)
    straight = torch.empty(shape, device="meta", dtype=dtype)
    for x in (straight, straight.transpose(0, -1).contiguous().transpose(0, -1)):
        wanted = described(norm, x)
        with AnswersAtOnce():
            assert described(norm, x) == wanted


@pytest.mark.parametrize("shape", [(2, 4, 5, 2), (2, 1, 1, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_sampling_on_a_grid(dtype, shape):
    x, grid = (torch.empty(s, device="meta", dtype=dtype) for s in ((2, 3, 7, 6), shape))

    def sample(x):
        return nn.functional.grid_sample(x, grid, align_corners=True)

    for given in (x, x.transpose(2, 3)):
        wanted = described(sample, given)
        with AnswersAtOnce():
            assert described(sample, given) == wanted


def test_a_grid_that_does_not_fit_is_left_to_torch():
    x = torch.empty(2, 3, 7, 6, device="meta")
    for shape in ((1, 4, 5, 2), (2, 4, 5, 3)):
        grid = torch.empty(shape, device="meta")
        with AnswersAtOnce(), pytest.raises((RuntimeError, AssertionError)):
            nn.functional.grid_sample(x, grid, align_corners=True)


def test_a_wrong_width_is_left_to_torch():
    with AnswersAtOnce(), torch.no_grad():
        for norm in (nn.BatchNorm2d(5), nn.LayerNorm(7)):
            with pytest.raises(RuntimeError):
                norm.to("meta").eval()(torch.empty(2, 4, 5, 6, device="meta"))


def test_real_numbers_are_left_to_torch():
    torch.manual_seed(0)
    x = torch.randn(2, 4, 5, 6)
    for norm in (nn.BatchNorm2d(4).eval(), nn.LayerNorm(6)):
        with torch.no_grad():
            wanted = norm(x)
            with AnswersAtOnce():
                assert torch.equal(norm(x), wanted)


@pytest.mark.parametrize(("norm", "shape"), [ASKED[0], ASKED[5]])
def test_it_is_what_answers(norm, shape, monkeypatch):
    """A wrong answer comes out: so the comparisons above compare it with torch's."""
    wrong = (torch.empty(7, device="meta"),) * 3
    for func in answers._ANSWERS:
        monkeypatch.setitem(answers._ANSWERS, func, lambda *args: wrong)
    with AnswersAtOnce(), torch.no_grad():
        assert norm.to("meta").eval()(torch.empty(shape, device="meta")).shape == (7,)

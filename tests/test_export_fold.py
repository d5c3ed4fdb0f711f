"""Norms are folded into convolutions where nothing else reads them, and the model keeps its own."""

import copy

import pytest
import torch
from torch import nn

from attnsurgeon.export import fold
from attnsurgeon.export.fold import fold_norms

NORM = torch.ops.aten.batch_norm.default


def randomised(model):
    """Give norms statistics of their own, as after training."""
    torch.manual_seed(0)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2.0)
            if norm.affine:
                nn.init.uniform_(norm.weight, 0.5, 2.0)
                nn.init.normal_(norm.bias)
    return model.eval()


def program_of(model, image):
    with torch.no_grad():
        return torch.export.export(model, (image,))


def norms_in(program):
    return sum(node.target is NORM for node in program.graph.nodes)


@pytest.mark.parametrize(
    "conv",
    [
        nn.Conv2d(4, 8, 3, bias=False),
        nn.Conv2d(4, 8, 3, bias=True),
        nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=4, dilation=2),
        nn.Conv2d(4, 8, 3, padding="same"),
    ],
    ids=["plain", "bias", "grouped", "same"],
)
def test_a_norm_after_a_convolution_is_folded(conv):
    model = randomised(nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU()))
    image, before = torch.randn(2, 4, 9, 9), copy.deepcopy(model.state_dict())
    program = program_of(model, image)
    assert fold_norms(program) == 1
    assert norms_in(program) == 0
    assert set(program.state_dict) == {"0.weight", "1.bias", "1.num_batches_tracked"}
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), model(image), rtol=1e-5, atol=1e-5)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert isinstance(model[0].weight, nn.Parameter)
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("kept", ["1.weight", "1.bias", "0.weight"])
def test_a_norm_that_is_a_gate_stays(kept):
    model = randomised(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)))
    program = program_of(model, torch.randn(2, 4, 9, 9))
    assert fold_norms(program, {kept}) == 0
    assert norms_in(program) == 1
    assert set(program.state_dict) == set(model.state_dict())


@pytest.mark.parametrize("at_once", [1, 80])
def test_large_filters_are_folded_in_parts(monkeypatch, at_once):
    """To the same bits, one at a time or two of 36 numbers."""
    model = randomised(nn.Sequential(nn.Conv2d(4, 7, 3), nn.BatchNorm2d(7)))
    image = torch.randn(2, 4, 9, 9)
    whole, parts = program_of(model, image), program_of(model, image)
    fold_norms(whole)
    monkeypatch.setattr(fold, "_AT_ONCE", at_once)
    fold_norms(parts)
    assert not parts.state_dict["0.weight"].requires_grad
    assert torch.equal(whole.state_dict["0.weight"], parts.state_dict["0.weight"])


def test_in_three_dimensions():
    model = randomised(nn.Sequential(nn.Conv3d(2, 4, 3), nn.BatchNorm3d(4)))
    image = torch.randn(1, 2, 5, 5, 5)
    program = program_of(model, image)
    assert fold_norms(program) == 1
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), model(image), rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    """Everything that must not be folded: another reader of the map, the filters or the norm."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.norm = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=kind != "not affine")

    def forward(self, x):
        y = self.conv(x)
        match self.kind:
            case "map read twice":
                return self.norm(y) + y
            case "conv run twice":
                return self.norm(self.conv(y))
            case "norm run twice":
                return self.norm(y) + self.norm(x)
            case "filters read elsewhere":
                return self.norm(y) * self.conv.weight.sum()
            case "norm before":
                return self.conv(self.norm(x))
        return self.norm(y)


@pytest.mark.parametrize(
    "kind",
    [
        "map read twice",
        "conv run twice",
        "norm run twice",
        "filters read elsewhere",
        "norm before",
        "not affine",
    ],
)
def test_what_something_else_reads_stays(kind):
    model = randomised(Shared(kind))
    image = torch.randn(2, 4, 5, 5)
    program = program_of(model, image)
    assert fold_norms(program) == 0
    with torch.no_grad():
        torch.testing.assert_close(program.module()(image), model(image))


def test_train_mode_stays():
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)).train()
    assert fold_norms(program_of(model, torch.randn(2, 4, 9, 9))) == 0


class Unsaved(nn.Module):
    """A norm after filters that are fixed, and in no state dict."""

    def __init__(self):
        super().__init__()
        self.register_buffer("fixed", torch.randn(8, 4, 3, 3), persistent=False)
        self.norm = nn.BatchNorm2d(8)

    def forward(self, x):
        return self.norm(nn.functional.conv2d(x, self.fixed))


def test_filters_that_are_not_saved_stay():
    program = program_of(randomised(Unsaved()), torch.randn(2, 4, 9, 9))
    assert fold_norms(program) == 0


def test_a_norm_of_more_bits_than_the_filters_stays():
    model = randomised(nn.Sequential(nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)))
    model[0].bfloat16()
    image = torch.randn(2, 4, 9, 9).bfloat16()
    program = program_of(model, image)
    assert fold_norms(program) == 0
    with torch.no_grad():
        assert torch.equal(program.module()(image), model(image))

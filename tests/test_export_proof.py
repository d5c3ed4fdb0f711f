"""The comparer tells right from wrong, and gates are opened until each of them shows."""

import copy
from itertools import pairwise

import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.errors import ExportRefused
from attnsurgeon.export import opening
from attnsurgeon.export.opening import open_gates
from attnsurgeon.export.proof import TOLERANCES, compare_outputs, gate_values, run_with_gates
from attnsurgeon.plan import make_plan
from attnsurgeon.surgery import apply_plan
from tests import exports, hosts


@pytest.fixture(scope="module")
def operated():
    return exports.tiny()


class TestComparer:
    def test_equal(self):
        x = torch.randn(4, 10)
        assert compare_outputs([x], [x.clone()], 1e-4) == (0.0, 0.0, pytest.approx(1.0), 1.0, True)

    @pytest.mark.parametrize(
        "wrong",
        [
            lambda x: x + 1e-3 * x.abs().max(),
            lambda x: x.flip(1),
            lambda x: x[:, :5],
            lambda x: x * float("nan"),
            lambda x: torch.where(x == x.max(), torch.inf, x),
            lambda x: -x,
            lambda x: x * 0,
        ],
    )
    def test_wrong(self, wrong):
        x = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
        assert not compare_outputs([x], [wrong(x)], 1e-4)[-1]
        assert not compare_outputs([x], [], 1e-4)[-1]

    @pytest.mark.parametrize("scale", [1e-30, 1e30])
    def test_any_scale(self, scale):
        x = torch.randn(4, 10, dtype=torch.float64) * scale
        assert compare_outputs([x], [x.clone()], 1e-4)[2:] == (pytest.approx(1.0), 1.0, True)
        assert not compare_outputs([x], [x.flip(1)], 1e-4)[-1]
        assert not compare_outputs([x], [x * 0], 1e-4)[-1]
        assert not compare_outputs([x * 0], [x], 1e-4)[-1]

    def test_nan_on_both_sides_is_no_agreement(self):
        x = torch.full((2, 3), float("nan"))
        assert not compare_outputs([x], [x], 1e-4)[-1]

    def test_top1(self):
        x = torch.eye(4)
        assert compare_outputs([x], [x.flip(1)], 1e-4)[3] == 0.0


@pytest.mark.parametrize("name", hosts.NAMES)
def test_each_gate_wired_wrongly_is_noticed(name):
    """Two neighbours exchanged, or one attention left out: the opened check sees it."""
    model = copy.deepcopy(hosts.host(name))
    plan = make_plan(model, hosts.sites(name), "se", every=3)
    apply_plan(model, plan)
    image = (hosts.image(1),)
    opening = open_gates(model, image)
    assert opening.unseen == ()
    opened = opening.values
    expected = run_with_gates(model, opened, image)
    near = sorted(opened, key=lambda path: opened[path].item())
    assert len({value.item() for value in opened.values()}) == len(near) > 1
    wrong = [{**opened, path: torch.zeros(1)} for path in near]
    wrong += [{**opened, a: opened[b], b: opened[a]} for a, b in pairwise(near)]
    for gates in wrong:
        found = run_with_gates(model, gates, image)
        assert not compare_outputs(expected, found, TOLERANCES[torch.float32])[-1]


def test_hidden_gates_are_opened_until_it_shows(operated):
    """A branch behind a tiny layer scale would hide whatever its attention computes."""
    hidden = copy.deepcopy(operated)
    paths = list(attnsurgeon.gates(hidden))
    weak = hidden.get_submodule(paths[1].removesuffix(".gate.openness"))
    nn.init.constant_(weak.excite.bias, 12.0)  # a map of nearly 1
    weak.excite.weight.data.mul_(1e-3)
    image = (torch.randn(1, 3, 32, 32),)
    assert max(v.abs().max() for v in open_gates(operated, image).values.values()) <= 1
    opened = open_gates(hidden, image).values
    assert [path for path, value in opened.items() if value.abs() > 1] == [paths[1]]
    assert all(not value.any() for value in gate_values(hidden).values())
    assert not any(p.grad is not None for p in hidden.parameters())


class Centred(exports.Tiny):
    """Writes to what it is given."""

    def forward(self, x):
        return super().forward(x.sub_(0.5))


def test_a_network_that_writes_to_its_inputs_is_compared_on_what_both_were_given(tmp_path):
    torch.manual_seed(0)
    model = Centred().eval()
    for name in ("x.onnx", "x.pt"):
        found = attnsurgeon.export_model(model, tmp_path / name, example=exports.EXAMPLE)
        assert all(check.passed for check in found.checks)


def test_opening_gates_leaves_the_inputs_as_they_were():
    model = nn.Sequential(nn.ReLU(inplace=True), copy.deepcopy(exports.tiny())).eval()
    given = torch.randn(2, 3, 32, 32)
    kept = given.clone()
    opening._shifts(model, opening.plain_openings(model), (given,))
    assert torch.equal(given, kept)


def test_a_check_that_could_not_fail_is_refused(operated, tmp_path):
    """Where attention moves no output, an opened file would agree whatever it computes."""
    silent = copy.deepcopy(operated)
    for parameter in silent.head.parameters():
        parameter.data.zero_()
    with pytest.raises(ExportRefused, match="moves no output visibly"):
        attnsurgeon.export_model(silent, tmp_path / "x.pt", example=exports.EXAMPLE)
    assert list(tmp_path.iterdir()) == []


def test_gates_are_not_opened_to_where_rounding_shows():
    """There two right engines would disagree, and a right file would be refused."""
    from tests.test_contract import mixture

    model = mixture("efficientnet_b0")
    images = (torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)),)
    found = open_gates(model, images)
    assert found.unseen == ()
    opened = run_with_gates(model, found.values, images)
    assert opening._noise(model, found.values, images, opened) < opening.NOISE * 1e-4
    far = {name: 10 * value for name, value in found.values.items()}
    assert not opening._noise(model, far, images, run_with_gates(model, far, images)) < 1e-4

"""A product and the sum it goes into are one operator, where nothing can tell the difference."""

import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.errors import ExportDiffers, ExportRefused
from attnsurgeon.export import scales, torchscript
from attnsurgeon.export.scales import join_scales
from attnsurgeon.export.torchscript import load_torchscript
from attnsurgeon.gate import named_gates
from tests.test_export_early import IMAGE, operated
from tests.test_export_early import rewritten as read_early

ATEN = torch.ops.aten


def outputs(program, model):
    with torch.no_grad():
        return program.module()(IMAGE.clone()), model(IMAGE.clone())


@pytest.mark.parametrize("opening", [0.0, 0.7, -0.4])
def test_it_computes_the_same_with_the_gate_at_any_value(opening):
    model = operated("se")
    for gate in named_gates(model).values():
        nn.init.constant_(gate, opening)
    program, _ = read_early(model)
    assert join_scales(program) == 2  # the gate's own sum, and the shortcut's
    assert ATEN.mul.Tensor not in {node.target for node in program.graph.nodes}
    torch.testing.assert_close(*outputs(program, model), rtol=1e-5, atol=1e-5)


class Sum(nn.Module):
    """Sums that must stay as they are, and one that need not."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y, s = self.conv(x), x.mean([2, 3], keepdim=True)
        product = y * s
        match self.kind:
            case "read twice":
                return (product + x) * product
            case "factor changes":
                y.add_(1)
                return product + x
            case "into the other":
                z = x.sin()
                total = z
                total += product
                return total * z
            case "other dtype":
                return product + x.double()
            case "scaled sum":
                return torch.add(product, x, alpha=2)
            case "with a number":
                return y * 2 + x
            case "in place":
                product += x
                return product
        return product + x


KINDS = ["read twice", "factor changes", "into the other", "other dtype", "scaled sum"]


@pytest.mark.parametrize("kind", [*KINDS, "with a number", "in place", "plain"])
def test_other_sums_stay(kind):
    model = Sum(kind).eval()
    with torch.no_grad():
        program = torch.export.export(model, (IMAGE,))
    assert join_scales(program) == (kind in ("plain", "in place"))
    torch.testing.assert_close(*outputs(program, model))


def test_a_change_in_between_would_be_seen(monkeypatch):
    monkeypatch.setattr(scales, "_writes", lambda node: False)
    model = Sum("factor changes").eval()
    with torch.no_grad():
        program = torch.export.export(model, (IMAGE,))
    assert join_scales(program) == 1
    found, wanted = outputs(program, model)
    assert (found - wanted).abs().max() > 1e-3


@pytest.mark.parametrize(("name", "options"), [("x.pt2", {}), ("x.pt", {"optimize": True})])
def test_files_of_torch_are_written_that_way(name, options, tmp_path):
    model = operated("se")
    path = tmp_path / name
    artifact = attnsurgeon.export_model(model, path, example=IMAGE, **options)
    assert all(check.passed for check in artifact.checks)
    if name == "x.pt2":
        graph = torch.export.load(path).graph
        kinds = [str(node.target) for node in graph.nodes]
    else:
        kinds = [node.kind() for node in load_torchscript(path)[0].inlined_graph.nodes()]
    assert sum("addcmul" in kind for kind in kinds) >= 1
    assert not any("batch_norm" in kind for kind in kinds)


class Flattens(nn.Module):
    """A network with attention that reads the sizes of what it is given."""

    def __init__(self):
        super().__init__()
        self.net = operated("se")

    def forward(self, x):
        out = self.net(x)
        return out.view(x.shape[0], out.shape[1], x.shape[2] * x.shape[3]).sum(2)


def test_what_reads_its_sizes_is_frozen_as_it_is_scripted(tmp_path):
    path = tmp_path / "x.pt"
    artifact = attnsurgeon.export_model(Flattens().eval(), path, example=IMAGE, optimize=True)
    assert len({(check.batch, check.size) for check in artifact.checks}) > 2
    kinds = {node.kind() for node in load_torchscript(path)[0].inlined_graph.nodes()}
    assert "aten::addcmul" not in kinds


def test_a_trace_that_holds_its_sizes_would_be_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(torchscript, "_reads_sizes", lambda program: False)
    with pytest.raises((ExportDiffers, ExportRefused)):
        attnsurgeon.export_model(Flattens().eval(), tmp_path / "x.pt", example=IMAGE, optimize=True)
    assert list(tmp_path.iterdir()) == []

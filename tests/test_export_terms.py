"""A vector that attention adds joins the shortcut, and its gate the weights behind it."""

import pytest
import torch
from torch import nn

from attnsurgeon.export import terms
from attnsurgeon.export.terms import gate_weights, move_terms
from attnsurgeon.gate import named_gates
from tests.test_export_early import IMAGE, operated
from tests.test_export_early import rewritten as read_early

ATEN = torch.ops.aten


def rewritten(model):
    program, _ = read_early(model)
    moved = move_terms(program)
    gate_weights(program)
    return program, moved


def outputs(program, model):
    with torch.no_grad():
        return program.module()(IMAGE), model(IMAGE)


@pytest.fixture
def gc():
    return operated("gc")


@pytest.mark.parametrize("opening", [0.0, 0.7, -0.4])
def test_it_computes_the_same_with_the_gate_at_any_value(gc, opening):
    for gate in named_gates(gc).values():
        nn.init.constant_(gate, opening)
    program, moved = rewritten(gc)
    assert moved == 1
    torch.testing.assert_close(*outputs(program, gc), rtol=1e-5, atol=1e-5)


def test_the_convolution_adds_the_shortcut_last(gc):
    program, _ = rewritten(gc)
    kinds = {node.target: node for node in program.graph.nodes}
    assert any(node.target is ATEN.conv2d.default for node in kinds[ATEN.relu.default].args[0].args)


def test_the_gate_still_opens_the_program(gc):
    program, _ = rewritten(gc)
    (name,) = named_gates(gc)
    before = program.module()(IMAGE)
    program.state_dict[name] = nn.Parameter(torch.zeros(1))
    assert (program.module()(IMAGE) - before).abs().max() > 1e-3


def test_a_forgotten_gate_would_be_seen(gc, monkeypatch):
    def forget(node):
        node.replace_all_uses_with(node.args[1])
        node.graph.erase_node(node)

    monkeypatch.setattr(terms, "_gate_weights", forget)
    found, wanted = outputs(rewritten(gc)[0], gc)
    assert (found - wanted).abs().max() > 1e-3


class Sum(nn.Module):
    """Sums that must stay as they are."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.vector = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        y, t = self.conv(x), self.vector(x.mean([2, 3], keepdim=True))
        match self.kind:
            case "no shortcut":
                return torch.relu(y + t)
            case "whole map":
                return torch.relu((y + self.vector(x)) + x)
            case "read twice":
                return torch.relu((y + t) + x) + y
            case "no convolution":
                return torch.relu((x.sin() + t) + x)
            case "another vector":
                return torch.relu((y + t) + t.sin())
            case "into the shortcut":
                shortcut = x.sin()
                view = shortcut.flatten(2)
                shortcut += y + t
                return shortcut.sum() + view
            case "term changes":
                total = y + t
                t.relu_()
                return torch.relu(total + x)
            case "in place":
                total = y + t
                total += x
                return torch.relu(total)
        return torch.relu((y + t) + x)


KINDS = ["no shortcut", "whole map", "read twice", "no convolution", "another vector"]
KINDS += ["into the shortcut", "term changes"]


@pytest.mark.parametrize("kind", [*KINDS, "in place", "plain"])
def test_other_sums_stay(kind):
    model = Sum(kind).eval()
    program, moved = rewritten(model)
    assert moved == (kind in ("plain", "in place"))
    torch.testing.assert_close(*outputs(program, model))

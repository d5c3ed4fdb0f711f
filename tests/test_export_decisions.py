"""Decisions by values, which a trace cannot keep: they are told of, and sizes are none."""

import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.errors import ExportRefused
from attnsurgeon.export.decisions import decisions_notice

IMAGE = torch.zeros(1, 3, 8, 8)


@torch.jit.script_if_tracing
def doubled_where_large(y):
    if bool(y.abs().max() > 50):
        return y * 2
    return y


class Net(nn.Module):
    """A network that no compiler takes: its forward is looked up by name."""

    def __init__(self, way):
        super().__init__()
        self.conv, self.way = nn.Conv2d(3, 4, 1), way
        self.register_buffer("scale", torch.tensor(2.0))

    def forward(self, x, **unused):
        return getattr(self, self.way)(x)

    def by_value(self, x):
        y = self.conv(x)
        return y * 2 if y.abs().max() > 50 else y

    def by_a_view(self, x):
        held = torch.zeros(2, x.shape[0])
        held[0].copy_(x.mean((1, 2, 3)))
        return self.conv(x) * (2 if held.sum().item() > 50 else 1)

    def by_size(self, x):
        y = self.conv(x)
        count = x.new_ones(3).sum().item() + torch.ones_like(y).sum().item()
        return y * (2 if x.shape[-1] > 5000 and count > 0 else 1)

    def by_compiled_code(self, x):
        return doubled_where_large(self.conv(x))

    def by_what_it_holds(self, x):
        return self.conv(x) * self.scale.item()


def line_of(method, words):
    lines, first = inspect.getsourcelines(method)
    return first + next(i for i, line in enumerate(lines) if words in line)


@pytest.mark.parametrize(
    ("way", "words"), [("by_value", "> 50"), ("by_a_view", ".item()")], ids=["map", "view"]
)
def test_who_reads_a_number_decides(way, words):
    (notice,) = decisions_notice(Net(way), (IMAGE,))
    place = f"{Path(__file__).name}:{line_of(getattr(Net, way), words)}"
    assert f"Net decides by values of its inputs, at {place}: the traced file" in notice


@pytest.mark.parametrize("way", ["by_size", "by_what_it_holds", "by_compiled_code"])
@pytest.mark.filterwarnings("ignore:`torch.jit.script.* is deprecated")  # by whom it is tested
def test_what_a_trace_holds_is_not_told(way):
    assert decisions_notice(Net(way), (IMAGE,)) == ()


@pytest.mark.parametrize("suffix", [".pt", ".onnx"])
def test_whoever_exports_it_is_told(tmp_path, suffix):
    made = attnsurgeon.export_model(Net("by_value"), tmp_path / f"x{suffix}", example=IMAGE)
    assert any("decides by values of its inputs" in notice for notice in made.notices)
    made = attnsurgeon.export_model(Net("by_size"), tmp_path / f"y{suffix}", example=IMAGE)
    assert not any("decides by values" in notice for notice in made.notices)


def test_float64_has_no_convolutions_in_the_runtime(tmp_path):
    with pytest.raises(ExportRefused, match="is in float64, which ONNX Runtime .* to .pt"):
        attnsurgeon.export_model(nn.Conv2d(3, 4, 1).double(), tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []

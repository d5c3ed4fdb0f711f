"""Did the attention take: how far each gate opened, what its map does, what closing it changes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from attnsurgeon.borrow import borrowed_buffers, borrowed_modes, borrowed_values
from attnsurgeon.errors import BadFile, HostUnusable
from attnsurgeon.gate import named_gates
from attnsurgeon.plan import Cut
from attnsurgeon.surgery import attention_paths, cuts_of
from attnsurgeon.training.images import Sample
from attnsurgeon.training.maps import AttentionMap, watch_maps


@dataclass(frozen=True)
class Change:
    """How far an output is from another one.

    Attributes:
        relative: the length of the difference over the length of the output (all of it at once).
        largest: absolute difference of one element.
        top1: share of the images with another largest output, or None for what is no classifier.
    """

    relative: float
    largest: float
    top1: float | None


@dataclass(frozen=True)
class Opening:
    """One attention and its gates.

    Attributes:
        cut: where it stands.
        gates: name inside the block -> value; of several numbers, as of a last layer that is the
            gate, the one furthest from 0.
        variation: standard deviation of its maps over the images, over their mean magnitude:
            0 for attention that is the same for all images and only rescales.
        change: of the output when this attention alone is closed.
    """

    cut: Cut
    gates: Mapping[str, float]
    variation: float
    change: Change

    @property
    def openness(self) -> float:
        """The value of the gate that is furthest from 0, with its sign."""
        return max(self.gates.values(), key=abs)

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        value = self.openness
        return {
            "path": self.cut.path,
            "block": self.cut.block,
            "placement": self.cut.placement,
            "gates": dict(self.gates),
            "form": self.cut.gate,
            "openness": abs(value),
            "sign": (value > 0) - (value < 0),
            "variation": self.variation,
            "change": self.change.relative,
            "top1_changed": self.change.top1,
        }


def measure_openings(model: nn.Module, sample: Sample) -> list[Opening]:
    """Measure every attention that has a gate, along the depth; the model stays as it is.

    Raises:
        HostUnusable: there is none.
        BadFile: a gate is no number.
    """
    values = check_gates(model)
    depth = {child: i for i, child in enumerate(attention_paths(model))}
    cuts = sorted(
        (cut for cut in cuts_of(model) if cut.child in values), key=lambda cut: depth[cut.child]
    )
    output, maps = watch_maps(model, sample.inputs)
    return [
        Opening(
            cut,
            values[cut.child],
            _variation([found for found in maps if found.cut == cut]),
            compare_outputs(output, _with_closed(model, cut, sample)),
        )
        for cut in cuts
    ]


def check_gates(model: nn.Module) -> dict[str, dict[str, float]]:
    """Return child path -> gate -> value of each attention that has gates.

    Raises:
        HostUnusable: there is none.
        BadFile: a gate is no number.
    """
    values: dict[str, dict[str, float]] = {}
    for cut in cuts_of(model):
        for name, gate in named_gates(model.get_submodule(cut.child)).items():
            flat = gate.detach().flatten()
            value = flat[flat.abs().argmax()].item()
            if not bool(flat.isfinite().all()):
                raise BadFile(
                    f"the gate {cut.child}.{name} is NaN or infinite: training went astray; take "
                    "an earlier checkpoint"
                )
            values.setdefault(cut.child, {})[name.removesuffix(".openness")] = value
    if not values:
        raise HostUnusable("it has no gates: none were inserted, or they were stripped at 1")
    return values


def _variation(maps: list[AttentionMap]) -> float:
    """Return the mean over the maps of how much each differs from image to image."""
    shares = []
    for found in maps:
        magnitude = found.values.abs().mean()
        if len(found.values) > 1 and magnitude > 0:
            shares.append((found.values.std(0).mean() / magnitude).item())
    return sum(shares) / len(shares) if shares else 0.0


def _with_closed(model: nn.Module, cut: Cut, sample: Sample) -> Any:
    gates = list(named_gates(model.get_submodule(cut.child)).values())
    with torch.no_grad(), borrowed_values(gates):
        for gate in gates:
            gate.zero_()
        return run(model, sample)


def run(model: nn.Module, sample: Sample) -> Any:
    """Return the output of a model in eval mode; the model stays as it is."""
    with torch.no_grad(), borrowed_modes(model), borrowed_buffers(model):
        return model.eval()(*sample.inputs)


def compare_outputs(reference: Any, other: Any) -> Change:
    """Return how far one output is from another of the same structure."""
    want, have = (_floats(output) for output in (reference, other))
    difference = _flat(want) - _flat(have)
    length = _flat(want).norm()
    top1 = None
    if want[0].ndim == 2:
        top1 = (want[0].argmax(1) != have[0].argmax(1)).double().mean().item()
    return Change(
        (difference.norm() / length).item() if length else difference.norm().item(),
        difference.abs().max().item(),
        top1,
    )


def _floats(output: Any) -> list[Tensor]:
    return [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]


def _flat(leaves: list[Tensor]) -> Tensor:
    return torch.cat([leaf.double().flatten() for leaf in leaves])

"""How far gates are opened for a check: so far that what is behind each of them shows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnsurgeon.borrow import borrowed_buffers, borrowed_numerics, borrowed_randomness
from attnsurgeon.errors import ExportRefused
from attnsurgeon.export.format import leaves
from attnsurgeon.export.inputs import Inputs
from attnsurgeon.export.lending import shaken, steady
from attnsurgeon.export.proof import (
    compare_outputs,
    gate_values,
    gates_at,
    run_with_gates,
    tolerance_of,
)
from attnsurgeon.gate import named_gates

VISIBLE = 100
"""Opened gates must move the output by this many tolerances: what cannot be seen proves nothing."""
NOISE = 0.2
"""Of the tolerance: what rounding may take of it at most, where gates are opened very far."""
ROUNDS = 16
"""Of opening gates further, up to threefold: a layer scale of 1e-6 takes twelve."""


@dataclass(frozen=True)
class Opening:
    """Values to open gates with.

    Attributes:
        values: dotted path -> opening.
        unseen: the gates that move no output visibly, whatever is done.
    """

    values: dict[str, Tensor]
    unseen: tuple[str, ...]


def open_gates(model: nn.Module, inputs: Inputs) -> Opening:
    """Return an opening for every gate, all different, of which each visibly moves the output.

    Openings are spread over 0.25 to 1, of either sign in turn: all of one sign would shrink the
    signal at every block, until early ones cannot be seen. A gate whose place another's value
    could take unnoticed is opened further: a branch behind a tiny layer scale would otherwise hide
    whatever its attention computes. All together they must move the output by VISIBLE tolerances.

    Raises:
        ExportRefused: they never do, and a check of them would prove nothing.
    """
    openings = sound = _spread(named_gates(model))
    best: Opening | None = None
    own = gate_values(model)
    given, reference = inputs, run_with_gates(model, own, inputs)
    tolerance = tolerance_of(reference)
    closed = {name: torch.zeros_like(value) for name, value in openings.items()}
    calm = steady(model, closed, inputs)
    own_noise = _noise(model, closed, calm, run_with_gates(model, closed, calm))
    for _ in range(ROUNDS):
        drawn = steady(model, openings, inputs)
        if drawn is not given:
            given, reference = drawn, run_with_gates(model, own, drawn)
        opened = run_with_gates(model, openings, given)
        moved = compare_outputs(reference, opened, tolerance)[1]
        noise = _noise(model, openings, given, opened)
        if not _are_finite(opened) or not noise < max(NOISE * tolerance, 3 * own_noise):
            if openings is sound:
                openings = sound = {name: value / 2 for name, value in sound.items()}
            else:  # too far: half way back, as factors go
                openings = {n: v.sign() * (v * sound[n]).sqrt() for n, v in openings.items()}
            continue
        shifts = _shifts(model, openings, given)
        hidden = {name: shift for name, shift in shifts.items() if not shift > tolerance}
        if moved > VISIBLE * tolerance:
            if best is None or len(hidden) < len(best.unseen):
                best = Opening(openings, tuple(hidden))
            if not hidden:
                break
        sound, openings = openings, _further(openings, hidden or shifts, tolerance)
    if best is None:
        raise ExportRefused(
            f"opening the gates of {type(model).__name__} moves no output visibly: what is behind "
            "them cannot be checked; nothing was kept; give weights with which the attention counts"
        )
    return best


def _noise(
    model: nn.Module, openings: Mapping[str, Tensor], inputs: Inputs, opened: list[Tensor]
) -> float:
    """Return how far the output moves, over its largest element, when the inputs hardly do.

    Where that is much, rounding alone moves it as much, and two right engines would disagree.
    """
    return compare_outputs(opened, run_with_gates(model, openings, shaken(inputs)), 1.0)[1]


def _are_finite(outputs: list[Tensor]) -> bool:
    return all(bool(leaf.isfinite().all()) for leaf in outputs)


def _further(
    openings: Mapping[str, Tensor], hidden: Mapping[str, float], tolerance: float
) -> dict[str, Tensor]:
    """Open the hidden gates up to threefold; slope and distance to others both grow with it."""
    factors = {
        name: min(max((tolerance / max(shift, 1e-30)) ** 0.5, 1.5), 3.0)
        for name, shift in hidden.items()
    }
    return {name: value * factors.get(name, 1.0) for name, value in openings.items()}


def _spread(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return evenly spaced values of 0.25 to 1, shuffled, with alternating signs."""
    step = 0.75 / max(len(gates), 1)
    with borrowed_randomness(1):
        places = torch.randperm(len(gates)).tolist()
        return {
            name: (-1) ** i * (0.25 + step * (place + 0.25 + 0.5 * torch.rand(gate.shape)))
            for i, (place, (name, gate)) in enumerate(zip(places, gates.items(), strict=True))
        }


def _shifts(model: nn.Module, openings: Mapping[str, Tensor], inputs: Inputs) -> dict[str, float]:
    """Return how far the output moves, over its largest element, where a gate is wired wrongly.

    It is the least, as root mean square, that any other gate's value, or none at all, makes in its
    place: to first order, from the gradient of the output's elements added up with random signs,
    which on average has the length of the gradients of all elements together.
    """
    gates = named_gates(model)
    with gates_at(model, openings), borrowed_buffers(model), borrowed_numerics():
        for gate in gates.values():
            gate.requires_grad_(True)
        with torch.enable_grad():
            outputs = [leaf for leaf in leaves(model(*inputs)) if leaf.requires_grad]
            largest = max((leaf.abs().max().item() for leaf in outputs), default=0.0)
            slopes = _slopes(outputs, list(gates.values()))
    values = [0.0, *(value.mean().item() for value in openings.values())]
    return {
        name: slope * _distance(openings[name].mean().item(), values) / (largest or 1.0)
        for name, slope in zip(gates, slopes, strict=True)
    }


def _distance(value: float, others: list[float]) -> float:
    """Return how far the nearest other value is."""
    return min(abs(value - other) for other in others if other != value)


def _slopes(outputs: list[Tensor], gates: list[nn.Parameter]) -> list[float]:
    """Return by how much an output element moves per opening of each gate, as root mean square."""
    if not outputs:
        return [0.0] * len(gates)
    count = sum(leaf.numel() for leaf in outputs)
    slopes = [0.0] * len(gates)
    for seed in range(2):  # by chance one sum of signs may miss a gate, two hardly
        with borrowed_randomness(seed):
            signs = [torch.randn(leaf.shape).sign().to(leaf) for leaf in outputs]
        found = torch.autograd.grad(outputs, gates, signs, retain_graph=True, allow_unused=True)
        slopes = [
            max(slope, 0.0 if grad is None else grad.abs().max().item() / count**0.5)
            for slope, grad in zip(slopes, found, strict=True)
        ]
    return slopes

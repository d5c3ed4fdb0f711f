"""Compare a written file with the model, with its gates as they are and with all of them open."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.borrow import (
    borrowed_buffers,
    borrowed_modes,
    borrowed_numerics,
    borrowed_randomness,
    borrowed_values,
)
from attnsurgeon.errors import ExportRefused
from attnsurgeon.export.format import RunFailed, Runner, leaves, leaves_on_cpu
from attnsurgeon.gate import named_gates

# Another engine sums in another order: in float32 that moves the largest output by some 1e-6 of
# itself, where a wrong constant, axis or gate moves it by 1e-2 and more. Half precision holds 3
# (float16) or 2 (bfloat16) digits per operation.
TOLERANCES = {torch.float32: 1e-4, torch.float64: 1e-6, torch.float16: 2e-2, torch.bfloat16: 1e-1}
MIN_COSINE = 0.9999
VISIBLE = 100
"""Opened gates must move the output by this many tolerances: what cannot be seen proves nothing."""
NOTICED = 3
"""Each gate, at the value of another, must move it by so many."""


@dataclass(frozen=True)
class Check:
    """One comparison of a written file with the model.

    Attributes:
        gates: `closed` (all at 0, as after insertion) or `open`.
        batch: number of images.
        size: height and width in pixels.
        max_abs: largest absolute difference of an output element.
        max_rel: that over the largest absolute output of the model.
        cosine: between both outputs, flattened.
        top1_agreement: share of the images with the same largest output.
        passed: within the tolerances, and nothing NaN or infinite.
    """

    gates: str
    batch: int
    size: tuple[int, int]
    max_abs: float
    max_rel: float
    cosine: float
    top1_agreement: float
    passed: bool

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {**asdict(self), "size": list(self.size)}


def compare_outputs(
    expected: list[Tensor], found: list[Tensor], tolerance: float
) -> tuple[float, float, float, float, bool]:
    """Return max_abs, max_rel, cosine, top1_agreement and whether that passes."""
    same_shapes = [t.shape for t in expected] == [t.shape for t in found]
    if not same_shapes or not expected:
        return float("inf"), float("inf"), 0.0, 0.0, False
    want = torch.cat([t.double().flatten() for t in expected])
    have = torch.cat([t.double().flatten() for t in found])
    if not bool(want.isfinite().all() and have.isfinite().all()):
        return float("inf"), float("inf"), 0.0, 0.0, False
    max_abs = (want - have).abs().max().item()
    largest = want.abs().max().item()
    max_rel = max_abs / largest if largest else max_abs
    cosine = _cosine(want / largest, have / largest) if largest else float(max_abs == 0)
    agreement = _top1_agreement(expected[0], found[0])
    return max_abs, max_rel, cosine, agreement, max_rel <= tolerance and cosine >= MIN_COSINE


def _cosine(want: Tensor, have: Tensor) -> float:
    """Return the cosine of two vectors, of which the first has a largest element of 1."""
    length = want.norm() * have.norm()
    return (want @ have / length).item() if length else 0.0


def _top1_agreement(expected: Tensor, found: Tensor) -> float:
    if expected.ndim < 2:
        return 1.0
    return (expected.argmax(1) == found.argmax(1)).double().mean().item()


def gate_values(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every gate as it is."""
    return {name: gate.detach().clone() for name, gate in named_gates(model).items()}


def opened_values(model: nn.Module, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """Return an opening for every gate, all different, of which each visibly moves the output.

    Openings are spread over (0.25, 1) in random order. A gate whose place no other one could take
    unnoticed stays; the others are opened tenfold until that holds: a branch behind a tiny layer
    scale would otherwise hide whatever its attention computes. All together they must move the
    output by VISIBLE tolerances.

    Raises:
        ExportRefused: one never does, and a check of it would prove nothing.
    """
    openings = _spread(named_gates(model))
    reference = run_with_gates(model, gate_values(model), inputs)
    tolerance = TOLERANCES[reference[0].dtype]
    for _ in range(7):
        opened = run_with_gates(model, openings, inputs)
        moved = compare_outputs(reference, opened, tolerance)[1]
        if not moved > VISIBLE * tolerance:
            hidden = list(openings)
        else:
            shifts = _shifts(model, openings, inputs)
            hidden = [name for name, shift in shifts.items() if not shift > NOTICED * tolerance]
        if not hidden:
            return openings
        openings |= {name: 10 * openings[name] for name in hidden}
    raise ExportRefused(
        f"opening the gate {hidden[0]} of {type(model).__name__} moves no output visibly: what is "
        "behind it cannot be checked; nothing was kept; give weights with which the attention "
        "counts"
    )


def _spread(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return evenly spaced values in (0.25, 1), shuffled."""
    step = 0.75 / max(len(gates), 1)
    with borrowed_randomness(1):
        places = torch.randperm(len(gates)).tolist()
        return {
            name: 0.25 + step * (place + 0.25 + 0.5 * torch.rand(gate.shape))
            for place, (name, gate) in zip(places, gates.items(), strict=True)
        }


def _shifts(
    model: nn.Module, openings: Mapping[str, Tensor], inputs: tuple[Tensor, ...]
) -> dict[str, float]:
    """Return how far the output moves, over its largest element, where a gate is wired wrongly.

    It is the least that any other gate's value, or none at all, makes in its place: to first
    order, from the gradient of the output's elements added up with random signs, whose square is
    on average that of the root of the mean square.
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


def run_with_gates(
    model: nn.Module, gates: Mapping[str, Tensor], inputs: tuple[Tensor, ...]
) -> list[Tensor]:
    """Run the model in eval mode with these gate values; it is left as it was."""
    with gates_at(model, gates), torch.no_grad(), borrowed_buffers(model), borrowed_numerics():
        return leaves_on_cpu(model(*inputs))


@contextmanager
def gates_at(model: nn.Module, values: Mapping[str, Tensor]) -> Iterator[None]:
    """Set gates for a while, in eval mode."""
    gates = named_gates(model)
    with borrowed_modes(model), borrowed_values(list(gates.values())):
        model.eval()
        with torch.no_grad():
            for name, gate in gates.items():
                gate.copy_(values[name])
        yield


def check_file(
    run: Runner,
    model: nn.Module,
    gates: Mapping[str, Tensor],
    label: str,
    batches: list[Tensor],
) -> list[Check]:
    """Run a file and the model on each batch, with the model's gates at what the file holds."""
    checks = []
    for batch in batches:
        expected = run_with_gates(model, gates, (batch,))
        try:
            found = run((batch,))
        except RunFailed:
            found = []  # a file that fails where the model runs is as different as can be
        height, width = batch.shape[-2:]
        tolerance = TOLERANCES[expected[0].dtype]
        figures = compare_outputs(expected, found, tolerance)
        checks.append(Check(label, batch.shape[0], (height, width), *figures))
    return checks

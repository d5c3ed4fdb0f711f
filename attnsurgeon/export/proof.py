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
    borrowed_values,
)
from attnsurgeon.export.detections import Detections, fields_of, outputs_of
from attnsurgeon.export.format import RunFailed, Runner
from attnsurgeon.export.inputs import Inputs, batch_of, copied, size_of
from attnsurgeon.export.precision import PRECISIONS, Precision
from attnsurgeon.gate import named_gates

TOLERANCES = {p.dtype: p.max_rel for p in PRECISIONS.values() if p.name != "int8"}
MIN_COSINE = 0.9999


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
    """Return max_abs, max_rel, cosine, top1_agreement and whether that passes.

    Of what a detector finds, the worst figure of any field, boxes or scores or labels.
    """
    if isinstance(expected, Detections):
        pairs = fields_of(expected, found, tolerance)
        figures = [_compare(want, have, tolerance) for want, have in pairs]
        absolute, relative, cosines, tops, passed = zip(*figures, strict=True)
        return max(absolute), max(relative), min(cosines), min(tops), all(passed)
    return _compare(expected, found, tolerance)


def _compare(
    expected: list[Tensor], found: list[Tensor], tolerance: float
) -> tuple[float, float, float, float, bool]:
    same_shapes = [t.shape for t in expected] == [t.shape for t in found]
    if not same_shapes or not expected:
        return float("inf"), float("inf"), 0.0, 0.0, False
    want = torch.cat([t.double().flatten() for t in expected])
    have = torch.cat([t.double().flatten() for t in found])
    if not want.numel():  # as where a detector finds nothing: that both are empty proves nothing
        return float("inf"), float("inf"), 0.0, 0.0, False
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
    if expected.ndim < 2 or not expected.numel():
        return 1.0
    return (expected.argmax(1) == found.argmax(1)).double().mean().item()


def gate_values(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of every gate as it is."""
    return {name: gate.detach().clone() for name, gate in named_gates(model).items()}


def run_with_gates(model: nn.Module, gates: Mapping[str, Tensor], inputs: Inputs) -> list[Tensor]:
    """Run the model in eval mode with these gate values; it and the inputs stay as they were."""
    with gates_at(model, gates), torch.no_grad(), borrowed_buffers(model), borrowed_numerics():
        return outputs_of(model(*copied(inputs)))


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
    batches: list[Inputs],
    precision: Precision = PRECISIONS["fp32"],
) -> list[Check]:
    """Run a file and the model on each input, with the model's gates at what the file holds.

    The file, of that precision, is given the inputs as it takes them.
    """
    checks = []
    for inputs in batches:
        expected = run_with_gates(model, gates, inputs)
        try:
            found = run(precision.cast(inputs))
        except RunFailed:
            found = []  # a file that fails where the model runs is as different as can be
        worst, relative, cosine, same, _ = compare_outputs(expected, found, precision.max_rel)
        passed = precision.allows(relative, cosine)
        figures = worst, relative, cosine, same, passed
        checks.append(Check(label, batch_of(inputs), size_of(inputs), *figures))
    return checks


def tolerance_of(outputs: list[Tensor]) -> float:
    """Return what the least exact kind of number among the outputs allows."""
    return max((TOLERANCES.get(leaf.dtype, 0.0) for leaf in outputs), default=0.0)

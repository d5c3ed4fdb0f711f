"""How far gates are opened for a check: so far that what is behind each of them shows."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from attnsurgeon.borrow import borrowed_buffers, borrowed_numerics, borrowed_randomness
from attnsurgeon.errors import ExportRefused
from attnsurgeon.export.calm import all_tell, shaken, steady
from attnsurgeon.export.detections import by_field
from attnsurgeon.export.inputs import Inputs, copied, tensors_of
from attnsurgeon.export.lending import lent_alike
from attnsurgeon.export.precision import Precision
from attnsurgeon.export.proof import (
    compare_outputs,
    gate_values,
    gates_at,
    run_with_gates,
    tolerance_of,
)
from attnsurgeon.gate import named_gates, opened

VISIBLE, PLAIN = 100, 0.1
"""Opened gates must move the output by this many tolerances, or, where these are wide, by this
share of its largest element and two of them: what cannot be seen proves nothing."""
NOISE = 0.2
"""Of the tolerance: what rounding may take of it at most, where gates are opened very far."""
FARTHEST = 10.0
"""Of a gate in a file of few digits, which may never tell one gate from another."""
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


class Opener:
    """Opens the gates of a model for a check, anew whenever it is lent other numbers."""

    def __init__(
        self,
        model: nn.Module,
        batches: list[Inputs],
        precision: Precision,
        cast: nn.Module | None = None,
    ) -> None:
        """Take what opening_for takes; the cast copy is lent what the model is."""
        self._given = model, batches, precision, cast
        self._made: tuple[Mapping[str, Tensor], Opening] | None = None

    @property
    def first(self) -> Mapping[str, Tensor]:
        """Return how far they are opened before it is known whether that shows."""
        return _spread(named_gates(self._given[0]))

    def made_with(self, lent: Mapping[str, Tensor]) -> Opening:
        """Return how far they are opened while the model is lent these numbers."""
        if self._made is None or self._made[0] is not lent:
            with lent_alike(self._given[-1], lent):
                self._made = lent, opening_for(*self._given)
        return self._made[1]

    def values_with(self, lent: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the gates' values of that."""
        return self.made_with(lent).values


def opening_for(
    model: nn.Module, batches: list[Inputs], precision: Precision, cast: nn.Module | None = None
) -> Opening:
    """Return how far gates are opened; of eight bits, which never tell one from another, plainly.

    Which gate is whose was shown before on the file that they were made from. See open_gates.
    """
    if precision.name == "int8":
        return Opening(plain_openings(model), ())
    smallest = min(batches, key=_pixels)
    return open_gates(model, smallest, precision, cast, batches)


def open_gates(
    model: nn.Module,
    inputs: Inputs,
    precision: Precision | None = None,
    cast: nn.Module | None = None,
    batches: Iterable[Inputs] = (),
) -> Opening:
    """Return an opening for every gate, all different, of which each visibly moves the output.

    Openings are spread over 0.25 to 1, of either sign in turn: all of one sign would shrink the
    signal at every block, until early ones cannot be seen. A gate whose place another's value
    could take unnoticed is opened further: a branch behind a tiny layer scale would otherwise hide
    whatever its attention computes. All together they must move the output visibly.

    Args:
        model: to be opened.
        inputs: what it is run on.
        precision: of the file to be checked, whose tolerance it is.
        cast: the model in that precision; what it loses is noise, and it opens no gate further.
        batches: in each of these a detector must find something with the openings returned.

    Raises:
        ExportRefused: they never do, and a check of them would prove nothing.
    """
    openings = sound = _spread(named_gates(model))
    best: Opening | None = None
    own = gate_values(model)
    given, reference = inputs, run_with_gates(model, own, inputs)
    tolerance = tolerance_of(reference) if precision is None else precision.max_rel
    visible = max(2 * tolerance, min(VISIBLE * tolerance, PLAIN))

    def noise_of(values: Mapping[str, Tensor], shown: Inputs, found: list[Tensor]) -> float:
        if precision is None or cast is None:
            return _noise(model, values, shown, found)
        rounded = run_with_gates(cast, values, precision.cast(shown))
        return compare_outputs(found, rounded, 1.0)[1]

    closed = {name: torch.zeros_like(value) for name, value in openings.items()}
    calm = steady(model, closed, inputs)
    own_noise = noise_of(closed, calm, run_with_gates(model, closed, calm))
    for _ in range(ROUNDS):
        drawn = steady(model, openings, inputs)
        if drawn is not given:
            given, reference = drawn, run_with_gates(model, own, drawn)
        found = run_with_gates(model, openings, given)
        moved = compare_outputs(reference, found, tolerance)[1]
        noise = noise_of(openings, given, found)
        is_calm = _are_finite(found) and noise < max(NOISE * tolerance, 3 * own_noise)
        if not is_calm or not all_tell(model, openings, batches):
            if openings is sound:
                openings = sound = {name: value / 2 for name, value in sound.items()}
            else:  # too far: half way back, as factors go
                openings = {n: v.sign() * (v * sound[n]).sqrt() for n, v in openings.items()}
            continue
        shifts = _shifts(model, openings, given)
        hidden = {name: shift for name, shift in shifts.items() if not shift > tolerance}
        if moved > visible:
            if best is None or len(hidden) < len(best.unseen):
                best = Opening(openings, tuple(hidden))
            if not hidden or (cast is not None and _farthest(openings) > FARTHEST):
                break
        sound, openings = openings, _further(openings, hidden or shifts, tolerance)
    if best is None:
        raise ExportRefused(
            f"opening the gates of {type(model).__name__} moves no output visibly: what is behind "
            "them cannot be checked; nothing was kept; give weights with which the attention counts"
        )
    return best


def _noise(
    model: nn.Module, openings: Mapping[str, Tensor], inputs: Inputs, output: list[Tensor]
) -> float:
    """Return how far the output moves, over its largest element, when the inputs hardly do.

    Where that is much, rounding alone moves it as much, and two right engines would disagree.
    """
    return compare_outputs(output, run_with_gates(model, openings, shaken(inputs)), 1.0)[1]


def _pixels(inputs: Inputs) -> int:
    return sum(part.numel() for part in tensors_of(inputs))


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


def _farthest(openings: Mapping[str, Tensor]) -> float:
    return max((value.abs().max().item() for value in openings.values()), default=0.0)


def plain_openings(model: nn.Module) -> dict[str, Tensor]:
    """Return an opening in (0, 1) for every gate, as training would leave them; layers as drawn."""
    values = _spread(named_gates(model))
    return {name: value.abs() if value.ndim < 2 else value for name, value in values.items()}


def _spread(gates: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return evenly spaced values of 0.25 to 1, shuffled, with alternating signs."""
    step = 0.75 / max(len(gates), 1)
    with borrowed_randomness(1):
        places = torch.randperm(len(gates)).tolist()
        return {
            name: (-1) ** i
            * opened(gate, 0.25 + step * (place + 0.25), 0.25 + step * (place + 0.75))
            for i, (place, (name, gate)) in enumerate(zip(places, gates.items(), strict=True))
        }


def _shifts(model: nn.Module, openings: Mapping[str, Tensor], inputs: Inputs) -> dict[str, float]:
    """Return how far the output moves, over its largest element, where a gate is wired wrongly.

    Of what a detector finds, that is the field that moves farthest. It is the least, as root mean
    square, that any other gate's value, or none at all, makes in its place: to first order, from
    the gradient of the output's elements added up with random signs, which on average has the
    length of the gradients of all elements together.
    """
    gates = named_gates(model)
    with gates_at(model, openings), borrowed_buffers(model), borrowed_numerics():
        for gate in gates.values():
            gate.requires_grad_(True)
        with torch.enable_grad():
            fields = by_field(model(*copied(inputs))).values()
            slopes = [_slopes(field, list(gates.values())) for field in fields]
    return {
        name: max(slope) * _distance(name, openings)
        for name, *slope in zip(gates, *slopes, strict=True)
    }


def _distance(name: str, openings: Mapping[str, Tensor]) -> float:
    """Return how far the nearest other value of its shape is, or none at all, in the mean."""
    own = openings[name]
    others = [v for other, v in openings.items() if other != name and v.shape == own.shape]
    apart = [(own - value).square().mean().sqrt().item() for value in (own * 0, *others)]
    return min(distance for distance in apart if distance)


def _slopes(field: list[Tensor], gates: list[nn.Parameter]) -> list[float]:
    """Return by how much an element moves per opening of each gate, as root mean square.

    That is over the largest element.
    """
    outputs = [leaf for leaf in field if leaf.requires_grad and leaf.numel()]  # labels have none
    slopes = [0.0] * len(gates)
    if not outputs:
        return slopes
    length = sum(leaf.numel() for leaf in outputs) ** 0.5
    largest = max(leaf.abs().max().item() for leaf in outputs) or 1.0
    for seed in range(2):  # by chance one sum of signs may miss a gate, two hardly
        with borrowed_randomness(seed):
            signs = [torch.randn(leaf.shape).sign().to(leaf) for leaf in outputs]
        found = torch.autograd.grad(outputs, gates, signs, retain_graph=True, allow_unused=True)
        slopes = [
            max(slope, 0.0 if grad is None else grad.abs().max().item() / length / largest)
            for slope, grad in zip(slopes, found, strict=True)
        ]
    return slopes

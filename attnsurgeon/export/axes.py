"""Which axes of its inputs a network takes in one size only, and which ones a file does."""

from __future__ import annotations

from collections.abc import Callable, Collection

from torch import nn

from attnsurgeon.errors import first_line
from attnsurgeon.export.inputs import (
    AXES,
    Inputs,
    batch_of,
    free_axes,
    resized,
    size_of,
    tensors_of,
)
from attnsurgeon.trial import runs_on, why_it_fails

_STEP = 32
"""Pixels by which a side is changed."""


def fixed_by_network(model: nn.Module, batches: list[Inputs]) -> dict[str, str]:
    """Return the axes that no trial could change -> what the network says where they are changed.

    Args:
        model: the network.
        batches: trials with all axes free, the one of its own size first.
    """
    own, *others = batches
    found = {}
    for axis in _axes_of(own):
        if all(_place(other)[axis] == _place(own)[axis] for other in others):
            error = why_it_fails(model, changed(own, axis))
            if error is not None:
                found[axis] = first_line(error)
    return found


def told(model: nn.Module, fixed: dict[str, str], inputs: Inputs) -> str:
    """Return the notice that these axes stay fixed, and why."""
    place = _place(inputs)
    axes = " and ".join(f"{axis} {place[axis]}" for axis in fixed)
    why = "; ".join(dict.fromkeys(fixed.values()))
    return f"the file takes {axes} only, as {type(model).__name__} itself does ({why})"


def fixed_by_file(
    agrees: Callable[[Inputs], bool], model: nn.Module, pair: Inputs, free: Collection[str]
) -> str | None:
    """Return the axis that came out fixed: with others as translated, it may not change alone.

    Args:
        agrees: tells whether the file computes what the model computes.
        model: the network.
        pair: the inputs that it was translated with.
        free: the axes that were to stay free.
    """
    axes = [axis for axis in _axes_of(pair) if axis in free]
    if not axes or not agrees(pair):
        return None
    others = ((axis, changed(pair, axis)) for axis in axes)
    return next((a for a, other in others if runs_on(model, other) and not agrees(other)), None)


def changed(inputs: Inputs, axis: str) -> Inputs:
    """Return inputs with one axis a little larger."""
    place = _place(inputs)
    place[axis] += 1 if axis == "batch" else _STEP
    return resized(inputs, place["batch"], (place["height"], place["width"]))


def _axes_of(inputs: Inputs) -> list[str]:
    """Return the axes that an image batch has; what takes lists of images resizes them itself."""
    if isinstance(inputs[0], list):
        return []
    held = {axis for part in tensors_of(inputs) for axis in free_axes(part.ndim).values()}
    return [axis for axis in AXES if axis in held]


def _place(inputs: Inputs) -> dict[str, int]:
    return dict(zip(AXES, (batch_of(inputs), *size_of(inputs)), strict=True))

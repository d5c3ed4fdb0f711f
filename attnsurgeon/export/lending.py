"""Weights with which a detector says enough to be compared.

A detector keeps what scores above a threshold and drops what overlaps. With random weights it may
find nothing, score in the hundreds, where rounding is as large as what is told apart, or score
everything alike: torchvision's SSDlite shrinks its signal to 1e-15, so that all 294,000 scores of
an image are exactly 1/91 and the first 300 are those that the sort leaves in front. Trained ones
may find nothing in noise. Opened gates shrink the signal again: torchvision's RetinaNet then finds
nothing in its largest images. Either way outputs tell nothing about the file. Then the layers
behind its backbone hold random numbers for the time of the check, in the model and in the file; the
file's own are compared byte for byte instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Protocol

from torch import Tensor, nn

from attnsurgeon.borrow import borrowed_values
from attnsurgeon.errors import ExportRefused
from attnsurgeon.export.calm import all_tell, steadiest
from attnsurgeon.export.heads import fill_heads, layers_behind
from attnsurgeon.export.inputs import Inputs
from attnsurgeon.export.proof import gate_values

DRAWS = 8
"""Of weights, of which one is taken where rounding decides nothing."""
ENOUGH = 3
"""Draws that can be compared at all: opening gates takes minutes, so the best of these is taken."""
SHAKY = 0.4
"""Of the tolerance: two engines may differ by twice as much as calm tells."""

REMEDY = "give weights with which it finds something"
NOTICE = (
    "with these weights {} finds too little to be compared by, or what rounding moves: {} held "
    "random numbers during the check, and those of the file were compared byte for byte"
)


class Opens(Protocol):
    """Tells with which gates a model is compared too."""

    @property
    def first(self) -> Mapping[str, Tensor]:
        """Return those that are tried first, whatever it is lent."""

    def values_with(self, lent: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return those that it is compared with while it is lent these numbers."""


@contextmanager
def lent_to(
    model: nn.Module,
    batches: list[Inputs],
    holds: Callable[[Mapping[str, Tensor]], set[str]],
    opener: Opens | None = None,
) -> Iterator[dict[str, Tensor]]:
    """Lend random numbers to the layers of a detector that says nothing; yield them by name.

    Most networks need none: what is yielded is empty, and nothing was done.

    Args:
        model: the network; it is given back as it was.
        batches: what it will be compared on.
        holds: tells which of these tensors the file has, by their names and byte for byte.
        opener: where it is compared with opened gates too: there it must find something as well.

    Raises:
        ExportRefused: it says nothing whatever it is lent, or the file's layers are out of reach.
    """
    nothing: dict[str, Tensor] = {}
    if not batches or not isinstance(batches[0][0], list):
        yield nothing
        return
    moved = _moved(model, batches, opener, nothing)
    if moved < SHAKY:
        yield nothing
        return
    layers = layers_behind(model, batches[0])
    own = {
        f"{path}.{name}": parameter
        for path in layers
        for name, parameter in model.get_submodule(path).named_parameters(recurse=False)
        if parameter.ndim > 1  # equal biases can be one tensor in the file
    }
    held = holds(own)
    own = {name: own[name] for name in own if name in held}
    layers = {
        path: layers[path] for path in layers if any(n.rpartition(".")[0] == path for n in own)
    }
    if not own:
        raise ExportRefused(
            f"{type(model).__name__} finds nothing to compare the file by, and its last layers "
            f"cannot be set in it; {REMEDY}"
        )
    gates = gate_values(model) if opener is None else opener.first
    with borrowed_values(list(own.values())):
        best, least, comparable = nothing, 1.0, 0
        for seed in range(DRAWS):
            fill_heads(model, layers, own, batches[0], gates, seed)
            lent = {name: parameter.detach().clone() for name, parameter in own.items()}
            moved = _moved(model, batches, opener, lent, least)
            if moved < least:
                best, least = lent, moved
            comparable += moved < 1
            if least < SHAKY or comparable == ENOUGH:
                break
        if not best:
            raise ExportRefused(
                f"{type(model).__name__} finds nothing, or what rounding decides, whatever its "
                f"last layers hold; {REMEDY}"
            )
        for name, parameter in own.items():
            parameter.data.copy_(best[name])
        yield best


@contextmanager
def lent_alike(copy: nn.Module | None, lent: Mapping[str, Tensor]) -> Iterator[None]:
    """Lend a copy of the network, in other numbers, what the network was lent."""
    own = {} if copy is None else {name: copy.get_parameter(name) for name in lent}
    with borrowed_values(list(own.values())):
        for name, parameter in own.items():
            parameter.data.copy_(lent[name])
        yield


def _moved(
    model: nn.Module,
    batches: list[Inputs],
    opener: Opens | None,
    lent: Mapping[str, Tensor],
    most: float = 1.0,
) -> float:
    """Return the share of the tolerance by which rounding moves what the model finds.

    That is on the images that steady chooses, with its gates as they are and opened; it is infinite
    where it finds nothing on some, or where nothing of what it finds moves when they are opened.

    Args:
        model: with these numbers lent to it.
        batches: what it is run on.
        opener: tells with which gates it is compared too.
        lent: what it was lent.
        most: where it is as much as this with its gates as they are, none are opened.
    """
    own = gate_values(model)
    if not all_tell(model, own, batches):
        return float("inf")
    moved = _most_moved(model, batches, own)
    if opener is None or not moved < most:
        return moved
    try:
        gates = opener.values_with(lent)
    except ExportRefused:
        return float("inf")
    return max(moved, _most_moved(model, batches, gates))


def _most_moved(model: nn.Module, batches: list[Inputs], gates: Mapping[str, Tensor]) -> float:
    most = 0.0
    for inputs in batches:
        most = max(most, steadiest(model, gates, inputs)[1])
        if not most < 1:
            break
    return most

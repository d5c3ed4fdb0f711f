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

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

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
from attnsurgeon.export.calm import all_tell, steadiest
from attnsurgeon.export.detections import by_field
from attnsurgeon.export.format import leaves
from attnsurgeon.export.inputs import Inputs, copied
from attnsurgeon.export.proof import gate_values, run_with_gates

LARGEST = 4.0
"""Largest number that a layer gives which leads to scores: enough that some pass a threshold.

Layers that see few positions, as the last of SSD do, would not be among the best with a common
standard deviation, and nothing that happens before them would show.
"""
FINE_LARGEST = 0.4
"""The same for boxes, masks and keypoints: anchors are large, and rounding grows with them."""
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
            _fill(model, layers, own, batches[0], gates, seed)
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


def layers_behind(model: nn.Module, inputs: Inputs) -> dict[str, float]:
    """Return the layers behind the backbone, and the largest number that each shall give.

    The backbone is the network's first part with weights. Layers that lead to scores are found on
    the way back from these, along what autograd would walk, up to the last weights; all may, where
    a network leaves before it has any.
    """
    parameters = list(model.parameters())
    flags = [parameter.requires_grad for parameter in parameters]
    with borrowed_modes(model), borrowed_buffers(model), borrowed_numerics():
        model.eval()
        try:
            for parameter in parameters:
                parameter.requires_grad_(True)
            with torch.enable_grad():
                output = model(*copied(inputs))
        finally:
            for parameter, flag in zip(parameters, flags, strict=True):
                parameter.requires_grad_(flag)
    fields = by_field(output)
    if "scores" not in fields:
        return {}
    scored = _behind(model, fields["scores"])
    backbone = next(
        name for name, child in model.named_children() if any(True for _ in child.parameters())
    )
    return {
        path: LARGEST if path in scored or not scored else FINE_LARGEST
        for path, module in model.named_modules()
        if path.partition(".")[0] != backbone
        and any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    }


def _behind(model: nn.Module, outputs: Iterable[Tensor]) -> set[str]:
    owners = {
        id(parameter): path
        for path, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
        if parameter.ndim > 1
    }
    found: set[str] = set()
    seen: set[Any] = {None}
    ahead: list[Any] = [output.grad_fn for output in outputs]
    while ahead:
        step = ahead.pop()
        if step in seen:
            continue
        seen.add(step)
        before = [node for node, _ in step.next_functions]
        held = {owners[key] for node in before if (key := _parameter_of(node)) in owners}
        found |= held
        ahead += [] if held else before
    return found


def _parameter_of(node: Any) -> int | None:
    """Return the id of the parameter that a step reads, also transposed as a linear layer does."""
    while node is not None and len(node.next_functions) == 1 and "TBackward" in node.name():
        node = node.next_functions[0][0]
    return id(node.variable) if hasattr(node, "variable") else None


def _fill(
    model: nn.Module,
    layers: Mapping[str, float],
    own: Mapping[str, Tensor],
    inputs: Inputs,
    gates: Mapping[str, Tensor],
    seed: int,
) -> None:
    """Fill these tensors of layers with random numbers, so scaled that each gives its largest.

    The number farthest from 0 that a layer gives, without its bias, becomes positive and as large
    as is said of it. That is with these gates: opened ones make some signals larger than others,
    and gates before those that fall behind would move nothing of what is found.
    """
    fillable = {id(part) for part in own.values()}
    filled: set[nn.Module] = set()

    def fill(layer: Any, given: Any, named: Any, _: Any) -> Any:
        if layer in filled:  # a head that runs once for each size of features
            return None
        weights = [part for part in layer.parameters(recurse=False) if id(part) in fillable]
        biases = [part for part in layer.parameters(recurse=False) if part.ndim < 2]
        with borrowed_values(biases):  # a tiny signal beside them
            for part in biases:
                nn.init.zeros_(part)
            for part in weights:
                nn.init.normal_(part)
            largest = _farthest_from_zero(leaves(layer.forward(*given, **named)))
        for part in weights:
            part.mul_(layers[names[layer]] / (largest or 1.0))
        if largest:
            filled.add(layer)
        return layer.forward(*given, **named)

    names = {model.get_submodule(path): path for path in layers}
    handles = [layer.register_forward_hook(fill, with_kwargs=True) for layer in names]
    try:
        with borrowed_randomness(seed), torch.no_grad():
            run_with_gates(model, gates, inputs)
    finally:
        for handle in handles:
            handle.remove()


def _farthest_from_zero(given: list[Tensor]) -> float:
    """Return that number of all; 0 where there is none, as of a head that is given no boxes."""
    numbers = [part.float().flatten() for part in given if part.numel()]
    return max((part[part.abs().argmax()].item() for part in numbers), key=abs, default=0.0)

"""The layers behind a detector's backbone, and random numbers by which they find something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
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
from attnsurgeon.export.detections import by_field
from attnsurgeon.export.format import leaves
from attnsurgeon.export.inputs import Inputs, copied
from attnsurgeon.export.proof import run_with_gates

LARGEST = 4.0
"""Largest number that a layer gives which leads to scores: enough that some pass a threshold.

Layers that see few positions, as the last of SSD do, would not be among the best with a common
standard deviation, and nothing that happens before them would show.
"""
FINE_LARGEST = 0.4
"""The same for boxes, masks and keypoints: anchors are large, and rounding grows with them."""


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


def fill_heads(
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

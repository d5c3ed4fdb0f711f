"""What all targets are called with: one input that fits them all, made in batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from itertools import cycle, islice
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from attnsurgeon.bench.targets import Inputs, Target
from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.errors import BadOption


def common_example(targets: Sequence[Target], size: tuple[int, int] | None) -> Inputs:
    """Return the inputs for one image that all targets are to be timed with.

    They are those of the first target whose size is known; `size` replaces height and width.

    Raises:
        BadOption: the targets take inputs of different kinds.
    """
    lead = next((target for target in targets if target.is_sized), targets[0])
    for target in targets:
        _check_like(target, lead)
    if size is None:
        return lead.example
    return tuple(
        part.new_empty(*part.shape[:2], *size) if _is_image(part) else part for part in lead.example
    )


def _is_image(part: Any) -> bool:
    return isinstance(part, Tensor) and part.ndim == 4


def _check_like(target: Target, lead: Target) -> None:
    mine, other = (_kinds(one.example) for one in (target, lead))
    if mine != other:
        raise BadOption(
            f"{target.name} takes {' and '.join(mine)}, {lead.name} takes {' and '.join(other)}: "
            "they cannot be compared"
        )


def _kinds(example: Inputs) -> list[str]:
    """Say what the inputs are, leaving out what may differ: batch, height and width."""
    return [
        f"{part.shape[1]}-channel images"
        if _is_image(part)
        else f"tensors of shape {('N', *part.shape[1:])}"
        if isinstance(part, Tensor)
        else "images of sizes of their own"
        if isinstance(part, list)
        else repr(part)
        for part in example
    ]


def make_inputs(example: Inputs, batch: int, device: torch.device) -> Inputs:
    """Return a batch like the example, each time the same: floats random, the rest repeated.

    A list holds images of sizes of their own, as detectors take them: those of the example in turn.
    """
    with borrowed_randomness(batch):
        return tuple(
            [image.to(device) for image in islice(cycle(part), batch)]
            if _is_list(part)
            else part
            if not isinstance(part, Tensor)
            else torch.randn(batch, *part.shape[1:]).to(device)
            if part.is_floating_point()
            else part[:1].expand(batch, *part.shape[1:]).contiguous().to(device)
            for part in example
        )


def _is_list(part: Any) -> bool:
    return isinstance(part, list) and bool(part) and all(isinstance(p, Tensor) for p in part)


def images_in(inputs: Inputs) -> int:
    """Return how many images a batch holds."""
    for part in inputs:
        if isinstance(part, Tensor) or _is_list(part):
            return len(part)
    return 1


def cast_inputs(inputs: Inputs, target: Target) -> Inputs:
    """Return the same inputs in the dtypes of the target; the very same ones where they fit."""
    return tuple(
        part.to(own.dtype)
        if isinstance(part, Tensor)
        else [image.to(own[0].dtype) for image in part]
        if _is_list(part)
        else part
        for part, own in zip(inputs, target.example, strict=True)
    )


def lay_out(inputs: Inputs, *, channels_last: bool) -> Inputs:
    """Return the inputs with the channels of image batches last in memory, where that is wished."""
    if not channels_last:
        return inputs
    return tuple(
        part.contiguous(memory_format=torch.channels_last) if _is_image(part) else part
        for part in inputs
    )


def send_inputs(inputs: Inputs, device: torch.device) -> tuple[Inputs, float | None]:
    """Return the inputs on a device, and the ms that sending takes; None where nothing is sent."""
    if device.type == "cpu":
        return inputs, None
    times = []
    for _ in range(3):  # the first one wakes the device
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        sent = tree_map_only(Tensor, lambda part: part.to(device), inputs)
        torch.cuda.synchronize(device)
        times.append(1e3 * (time.perf_counter() - start))
    return sent, min(times)

"""What a network is translated with and checked on: image batches, several of them, image lists."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.errors import BadOption, HostUnusable, first_line
from attnsurgeon.example import as_inputs
from attnsurgeon.trial import runs_on, why_it_fails

LARGEST_SIDE = 2**14
"""Pixels of an input's side: what is exported is run as well, and has to fit into memory."""

Inputs = tuple[Any, ...]
"""Positional inputs of a forward: tensors, or lists of images as detection networks take them."""

AXES = ("batch", "height", "width")
"""Of images: what stays free in a file."""


def free_axes(ndim: int, free: Collection[str] = AXES) -> dict[int, str]:
    """Return the axes of an input that stay free: of an image batch, a video, a listed image."""
    named = {3: AXES[1:], 4: AXES, 5: AXES}.get(ndim, AXES[:1])
    places = {3: (1, 2), 4: (0, 2, 3), 5: (0, 3, 4)}.get(ndim, (0,))
    return {i: axis for i, axis in zip(places, named, strict=True) if axis in free}


def tensors_of(inputs: Inputs) -> list[Tensor]:
    """Return all tensors of the inputs, in the order in which exported files take them."""
    return [leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def on_cpu(inputs: Inputs) -> Inputs:
    """Return the same inputs in the memory of the CPU."""
    moved: Inputs = tree_map_only(Tensor, lambda part: part.cpu(), inputs)
    return moved


def copied(inputs: Inputs) -> Inputs:
    """Return the same inputs in memory of their own, for a network that writes to what it takes."""
    copies: Inputs = tree_map_only(Tensor, Tensor.clone, inputs)
    return copies


def batch_of(inputs: Inputs) -> int:
    """Return the number of images."""
    first = inputs[0]
    return len(first) if isinstance(first, list | tuple) else int(first.shape[0])


def size_of(inputs: Inputs) -> tuple[int, int]:
    """Return height and width of the first image; 1 where it has none."""
    shape = (1, 1, *tensors_of(inputs)[0].shape)
    return int(shape[-2]), int(shape[-1])


def resized(inputs: Inputs, batch: int, size: tuple[int, int]) -> Inputs:
    """Return random inputs of the same kinds, of another batch and size.

    A list of images stays as long; every second image lies on its side.
    """

    def make(part: Tensor, shape_of: tuple[int, int] = size) -> Tensor:
        axes = free_axes(part.ndim)
        wanted = {"batch": batch, "height": shape_of[0], "width": shape_of[1]}
        shape = [wanted[axes[i]] if i in axes else n for i, n in enumerate(part.shape)]
        values = torch.randn(shape) if part.dtype.is_floating_point else torch.ones(shape)
        return values.to(part.device, part.dtype)

    def lying(part: Tensor) -> Tensor:
        return make(part, size[::-1])

    with borrowed_randomness(batch):
        return tuple(
            [tree_map_only(Tensor, lying if i % 2 else make, image) for i, image in enumerate(part)]
            if isinstance(part, list)
            else tree_map_only(Tensor, make, part)
            for part in inputs
        )


def example_inputs(model: nn.Module, example: Any, size: tuple[int, int] | None) -> Inputs:
    """Return one example that the network takes, of the size asked for.

    Raises:
        BadOption: a size out of range.
        HostUnusable: the network does not run at this size, or not on a batch of 1.
    """
    if size is not None and not 1 <= min(size) <= max(size) <= LARGEST_SIDE:
        raise BadOption(f"--input-size must be 1 to {LARGEST_SIDE}, not {size[0]},{size[1]}")
    given = as_inputs(model, (example,) if isinstance(example, list) else example)
    inputs = resized(given, 1, size or size_of(given))
    if not runs_on(model, resized(inputs, 2, size_of(inputs))):
        error = why_it_fails(model, inputs)
        if error is not None:
            raise HostUnusable(_why_not(model, given, inputs, error)) from error
    return inputs


def _why_not(model: nn.Module, given: Inputs, inputs: Inputs, error: BaseException) -> str:
    """Return what to say of a network that does not run on these inputs: which axis, and why."""
    (height, width), (own_height, own_width) = size_of(inputs), size_of(given)
    batch, name = batch_of(given), type(model).__name__
    if batch > 1 and runs_on(model, resized(given, batch, (height, width))):
        return (
            f"{name} takes a batch of {batch} only ({first_line(error)}), and files are checked on "
            "batches of any size: have its forward take them"
        )
    alone = {"height": (height, own_width), "width": (own_height, width)}
    guilty = [
        axis
        for axis, size in alone.items()
        if size != (own_height, own_width) and not runs_on(model, resized(inputs, 1, size))
    ]
    blamed = f", not of this {' and '.join(guilty)}" if guilty else ""
    return (
        f"{name} does not run on {height}x{width} images{blamed} ({first_line(error)}); "
        "give another --input-size"
    )


def trials(model: nn.Module, inputs: Inputs, fixed: Collection[str] = ()) -> list[Inputs]:
    """Return what both sides are run on: the size asked for, then other batches at two other sizes.

    Exactness of another batch does not depend on the size, and a small image is soon done. Axes of
    which the network takes no other size, and those that are fixed, stay as they are.
    """
    height, width = size_of(inputs)
    own = [resized(inputs, 1, (height, width))]
    if set(AXES) <= set(fixed):
        return own

    def kept(batch: int, size: tuple[int, int]) -> Inputs:
        new = {"batch": batch, "height": size[0], "width": size[1]}
        held = {"batch": 1, "height": height, "width": width}
        chosen = {axis: (held if axis in fixed else new)[axis] for axis in AXES}
        return resized(inputs, chosen["batch"], (chosen["height"], chosen["width"]))

    first = [(64, 96), (height + 32, width), (height, width)]
    second = [(96, 64), (height, width + 32), (height, width)]
    return own + [
        next(
            trial
            for count in (batch, 1)
            for size in sizes
            if runs_on(model, trial := kept(count, size))
        )
        for batch, sizes in ((2, first), (5, second))
    ]

"""The inputs that promises are checked on: random, small, in several sizes and batch sizes."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.errors import HostUnusable, first_line
from attnsurgeon.trial import remedy, runs_on, why_it_fails

Inputs = tuple[Any, ...]
SMALL_SIDE = 64
"""Pixels: exactness does not depend on the size of an image, and time does."""
SMALL_TIME = 8
"""Frames of a clip, for the same reason."""


def probe_inputs(model: nn.Module, example: Inputs, *, most: int = 2) -> list[Inputs]:
    """Return random inputs like the example: two batch sizes, and two resolutions where it can.

    With `most` = 1 only the first and smaller of them is made.

    A batch of images or clips is made small where the network runs at that size. A list of images,
    as detectors take it, becomes lists of two and of three images of different sizes.

    Raises:
        HostUnusable: the network does not run on the example's size either.
    """
    like = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    if len(example) != 1 or not isinstance(example[0], Tensor) or like[0].ndim not in (4, 5):
        return [random_inputs(example, batch) for batch in (2, 3)[:most]]
    image = like[0]
    own = tuple(image.shape[2:])
    base = next((size for size in _small_sizes(own) if _runs(model, image, size)), None)
    if base is None:
        batch = _batch(image, own)
        error = why_it_fails(model, batch, train=True)
        reason = f": {first_line(error)}" if error else ""
        raise HostUnusable(
            f"{type(model).__name__} fails on batches of {'x'.join(map(str, own))} images{reason}; "
            f"{remedy(model, batch)}"
        )
    first = random_inputs((_resized(image, base),), 2)
    if most == 1:
        return [first]
    others = [(*base[:-2], base[-2] + 32, base[-1]), (*own[:-2], own[-2] + 32, own[-1]), base]
    other = next(size for size in others if _runs(model, image, size))
    return [first, random_inputs((_resized(image, other),), 3)]


def _small_sizes(own: tuple[int, ...]) -> list[tuple[int, ...]]:
    """Return the sizes to try, the smallest first: of clips also fewer frames."""
    small = tuple(min(side, SMALL_SIDE) for side in own[-2:])
    times = [own[:-2]] if len(own) == 2 else [(min(own[0], SMALL_TIME),), own[:-2]]
    return [(*time, *side) for side in (small, own[-2:]) for time in times]


def _runs(model: nn.Module, image: Tensor, size: tuple[int, ...]) -> bool:
    return runs_on(model, _batch(image, size), train=True)


def _batch(image: Tensor, size: tuple[int, ...]) -> Inputs:
    return (_resized(image, size).expand(2, *([-1] * (len(size) + 1))),)


def _resized(image: Tensor, size: tuple[int, ...]) -> Tensor:
    return image.new_zeros(1, image.shape[1], *size)


def random_inputs(example: Inputs, batch: int) -> Inputs:
    """Return random inputs of the example's shapes, with another batch size.

    Floats are normal, lists of images uniform in [0, 1); all else is repeated.
    """
    with borrowed_randomness(batch):
        return tuple(_random_like(part, batch) for part in example)


def _random_like(part: Any, batch: int) -> Any:
    if isinstance(part, list):  # of images, each of its own size
        images = [part[i % len(part)] for i in range(batch)]
        return [torch.rand(image.shape).to(image.device, image.dtype) for image in images]
    if isinstance(part, Tensor) and part.is_floating_point():
        return torch.randn(batch, *part.shape[1:]).to(part.device, part.dtype)
    if isinstance(part, Tensor) and part.ndim:
        return part[:1].expand(batch, *part.shape[1:]).contiguous()
    return part


def arguments_in(mode: str, model: nn.Module, inputs: Inputs) -> Inputs:
    """Return what a model is called with in a mode: detectors in training want targets too."""
    images = inputs[0] if inputs else None
    if mode != "train" or not isinstance(images, list) or len(inputs) != 1:
        return inputs
    if not takes_targets(model):
        return inputs
    return (images, [_target(image) for image in images])


def takes_targets(model: nn.Module) -> bool:
    """Tell whether a network has a place for what it should find, as detectors in training do."""
    return "targets" in inspect.signature(model.forward).parameters


def unfolded(output: Any) -> Any:
    """Return an output with plain dataclasses in it as mappings, so that their tensors are seen."""

    def unfold(leaf: Any) -> Any:
        if not dataclasses.is_dataclass(leaf) or isinstance(leaf, type):
            return leaf
        return {item.name: unfolded(getattr(leaf, item.name)) for item in dataclasses.fields(leaf)}

    return tree_map(unfold, output)


def _target(image: Tensor) -> dict[str, Tensor]:
    """Return objects of several sizes in an image, with all that any detector asks for.

    A large one and a small one, so that the anchors of every scale are heard in the loss.
    """
    height, width = image.shape[-2:]
    frame = torch.tensor([width, height, width, height], dtype=torch.float32)
    corners = [(0.02, 0.02, 0.98, 0.98), (0.1, 0.2, 0.7, 0.8), (0.5, 0.1, 0.8, 0.4)]
    boxes = torch.tensor([*corners, (0.3, 0.6, 0.42, 0.72)]) * frame
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes.int().tolist(), strict=True):
        mask[top : bottom + 1, left : right + 1] = 1
    middles = (boxes[:, :2] + boxes[:, 2:]) / 2
    points = torch.cat((middles, torch.ones(len(boxes), 1)), 1)[:, None].repeat(1, 17, 1)
    labels = torch.ones(len(boxes), dtype=torch.int64)
    found = {"boxes": boxes, "labels": labels, "masks": masks, "keypoints": points}
    return {name: value.to(image.device) for name, value in found.items()}


@contextmanager
def probed(model: nn.Module) -> Iterator[None]:
    """Have a detector work on small images, and keep whatever it finds in them."""
    with small_resizes(model), thresholds_lifted(model):
        yield


@contextmanager
def thresholds_lifted(model: nn.Module) -> Iterator[None]:
    """Have a detector keep what it is not sure of: of nothing found, nothing can be compared."""
    held: list[tuple[Any, float]] = [
        (module, module.score_thresh)
        for module in cast("Iterator[Any]", model.modules())
        if isinstance(getattr(module, "score_thresh", None), float)
    ]
    try:
        for module, _ in held:
            module.score_thresh = -1.0
        yield
    finally:
        for module, threshold in held:
            module.score_thresh = threshold


@contextmanager
def small_resizes(model: nn.Module, sizes: Sequence[int] = (96, 160)) -> Iterator[None]:
    """Have a detector resize its images to small ones, and give it its sizes back.

    It would enlarge whatever it is given to some 800 pixels.
    """
    held: list[tuple[Any, Any, int]] = [
        (module, module.min_size, module.max_size)
        for module in cast("Iterator[Any]", model.modules())
        if isinstance(getattr(module, "min_size", None), tuple | list)
        and isinstance(getattr(module, "max_size", None), int)
        and getattr(module, "fixed_size", None) is None
    ]
    try:
        for module, smallest, _ in held:
            module.min_size = type(smallest)((sizes[0],))
            module.max_size = sizes[1]
        yield
    finally:
        for module, smallest, largest in held:
            module.min_size, module.max_size = smallest, largest

"""What a torchvision network takes, by its task: the published size where one is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torchvision.models import WeightsEnum, get_model_builder

from attnsurgeon.card import HostCard
from attnsurgeon.trial import runs_on

Shapes = tuple[tuple[int, ...], ...]
TASKS = ("detection", "segmentation", "video", "optical_flow")
"""Folders of torchvision.models; what lies in no such folder classifies images."""
CLASSIFICATION = "classification"
DETECTED = ((3, 240, 320), (3, 320, 256))
"""Sizes of two images in a list, which detectors resize themselves."""
CLIPS = ((16, 112, 112), (16, 224, 224))
"""Frames, height, width that video networks are published with."""
OTHER_SIDES = (32, 64, 96, 128, 160, 192, 256, 384, 512)
"""Tried where a network is built for images of another size than the published ones."""
POSSIBLE_SIDES = range(8, 2049)
"""What a number given to a builder may mean as a side."""
FLOW = (128, 128)
"""The smallest images that a flow network builds its pyramid from."""


def task_of(name: str) -> str:
    """Return the task of a registered name: classification, or one of TASKS."""
    folders = get_model_builder(name).__module__.split(".")
    return next((task for task in TASKS if task in folders), CLASSIFICATION)


def published_side(weights: WeightsEnum | None) -> int | None:
    """Return the side of the images that weights were measured with, as far as they say."""
    preset = weights.transforms() if weights is not None else None
    crop = getattr(preset, "crop_size", None) or getattr(preset, "resize_size", None)
    side = crop[0] if isinstance(crop, list | tuple) else crop
    return int(side) if side else None


def input_shapes(
    name: str,
    model: nn.Module,
    channels: int,
    weights: Iterable[WeightsEnum],
    arguments: Mapping[str, Any],
) -> tuple[Shapes, bool]:
    """Return the shapes of a network's inputs, and whether they come as one list of images.

    Of several published sizes the first that the network runs at is taken; an argument of the
    builder may be the side of its images too.
    """
    task = task_of(name)
    if task == "detection":
        return DETECTED, True
    if task == "optical_flow":
        return ((1, 3, *FLOW), (1, 3, *FLOW)), False
    if task == "video":
        return (_first(model, [(1, 3, *clip) for clip in CLIPS]),), False
    sides = [side for side in map(published_side, weights) if side] + [224, *OTHER_SIDES]
    sides += [n for n in arguments.values() if type(n) is int and n in POSSIBLE_SIDES]
    return (_first(model, [(1, channels, side, side) for side in sides]),), False


def _first(model: nn.Module, shapes: list[tuple[int, ...]]) -> tuple[int, ...]:
    return next((s for s in shapes if runs_on(model, (torch.empty(s),))), shapes[0])


def describe_inputs(card: HostCard) -> str:
    """Return the inputs of a card in words, such as 3 x 224 x 224."""
    if card.listed:
        return "images of any size"
    return " and ".join(" x ".join(map(str, shape[1:])) for shape in card.input_shapes)

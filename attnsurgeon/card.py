"""How a host is made again, and what its inputs and outputs mean."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.errors import BadFile
from attnsurgeon.schema import read_as

WEIGHT_ARGUMENTS = (
    "weights",
    "weights_backbone",
    "pretrained",
    "pretrained_backbone",
    "progress",
)
"""Arguments of torchvision's builders that fetch something; no card may name one."""
_MOST_NUMBERS = 2**28
"""In one input that a file asks for: a gigabyte of float32."""


@dataclass(frozen=True)
class HostCard:
    """How a host is made again, and what its inputs and outputs mean; it stands in every recipe.

    `name` is None for a network of the user's own: it must be given again at loading. `listed`
    says that the inputs come as one list of images (3, H, W), as detectors take them.
    """

    name: str | None
    class_name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    input_shapes: tuple[tuple[int, ...], ...] = ((1, 3, 224, 224),)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    categories: tuple[str, ...] | None = None
    listed: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain values that `from_json` reads."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HostCard:
        """Read what `to_json` wrote.

        Raises:
            BadFile: a field is missing, unknown, of the wrong kind or out of range.
        """
        try:
            card: HostCard = read_as(cls, data, "host")
            if set(card.arguments) & set(WEIGHT_ARGUMENTS):
                raise ValueError("the host's arguments name weights")
            if not card.input_shapes or not all(map(_is_small_shape, card.input_shapes)):
                raise ValueError(f"no network takes inputs of shape {card.input_shapes}")
        except ValueError as error:
            raise BadFile(str(error)) from error
        return card

    def example(self, like: Tensor | None = None) -> tuple[Any, ...]:
        """Return zeros of the input's shapes, with the device and dtype of `like`."""
        like = torch.empty(0) if like is None else like
        parts = [
            torch.zeros(*shape, device=like.device, dtype=like.dtype) for shape in self.input_shapes
        ]
        return (parts,) if self.listed else tuple(parts)


def _is_small_shape(shape: tuple[int, ...]) -> bool:
    return bool(shape) and min(shape) >= 1 and math.prod(shape) <= _MOST_NUMBERS


def card_of(model: nn.Module) -> HostCard | None:
    """Return the card that a host was loaded with, or None."""
    card: HostCard | None = model.__dict__.get("_attnsurgeon_card")
    return card


def give_card(model: nn.Module, card: HostCard) -> None:
    """Let the card travel with the model, through copies and pickles."""
    model.__dict__["_attnsurgeon_card"] = card

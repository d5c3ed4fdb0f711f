"""How a host is made again, and what its inputs and outputs mean."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.errors import BadFile, BadOption
from attnsurgeon.schema import read_as

WEIGHT_ARGUMENTS = (
    "weights",
    "weights_backbone",
    "pretrained",
    "pretrained_backbone",
    "progress",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "checkpoint_path",
    "cache_dir",
)
"""Arguments of torchvision's and timm's builders that fetch or read; no card may have one do so."""
_FETCH_NOTHING = (None, False, "none")
"""Their values in the card of a network of the user's own, whose factory may need to be told."""
DTYPES = (
    *("float64", "float32", "float16", "bfloat16"),
    *("int64", "int32", "int16", "int8", "uint8", "bool"),
)
"""What an input may be made of, by torch's names."""
_MOST_NUMBERS = 2**28
"""In one input that a file asks for: a gigabyte of float32."""


@dataclass(frozen=True)
class HostCard:
    """How a host is made again, and what its inputs and outputs mean; it stands in every recipe.

    `name` is None for a network of the user's own: it must be given again at loading. What made
    it is then noted in `factory`, to be shown and never to be run. `listed` says that the inputs
    come as one list of images (3, H, W), as detectors take them. An input of dtype None is of that
    of the network.
    """

    name: str | None
    class_name: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    weights: str | None = None
    input_shapes: tuple[tuple[int, ...], ...] = ((1, 3, 224, 224),)
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    categories: tuple[str, ...] | None = None
    input_dtypes: tuple[str | None, ...] | None = None
    factory: str | None = None
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
            weighty = set(card.arguments) & set(WEIGHT_ARGUMENTS)
            if weighty and (card.name or without_fetching(card.arguments) != card.arguments):
                raise ValueError("the host's arguments name weights")
            if not card.input_shapes or not all(map(_is_small_shape, card.input_shapes)):
                raise ValueError(f"no network takes inputs of shape {card.input_shapes}")
            dtypes = card.input_dtypes
            if dtypes is not None and len(dtypes) != len(card.input_shapes):
                raise ValueError("the host's inputs have more dtypes than shapes, or fewer")
            if dtypes is not None and not set(dtypes) <= {None, *DTYPES}:
                raise ValueError(f"no network takes inputs of dtype {dtypes}")
        except ValueError as error:
            raise BadFile(str(error)) from error
        return card

    def example(self, like: Tensor | None = None) -> tuple[Any, ...]:
        """Return zeros of the input's shapes, with the device and, where none is noted, dtype."""
        like = torch.empty(0) if like is None else like
        dtypes = self.input_dtypes or (None,) * len(self.input_shapes)
        parts = [
            torch.zeros(
                *shape, device=like.device, dtype=getattr(torch, dtype) if dtype else like.dtype
            )
            for shape, dtype in zip(self.input_shapes, dtypes, strict=True)
        ]
        return (parts,) if self.listed else tuple(parts)

    def with_inputs(self, texts: Sequence[str]) -> HostCard:
        """Return the card with inputs given as text: `1,3,32,32`, or `1,16:int64`.

        Raises:
            BadOption: a text that is none of these, or a size that no memory holds.
        """
        read = [_read_input(text) for text in texts]
        dtypes = tuple(dtype for _, dtype in read)
        return replace(
            self,
            input_shapes=tuple(shape for shape, _ in read),
            input_dtypes=dtypes if any(dtypes) else None,
        )

    def with_example(self, inputs: Sequence[Any], like: Tensor | None) -> HostCard:
        """Return the card with the shapes of these inputs, and their dtypes where not `like`'s."""
        is_list = len(inputs) == 1 and isinstance(inputs[0], list)
        parts = inputs[0] if is_list else inputs
        tensors = [part for part in parts if isinstance(part, Tensor)]
        usual = torch.get_default_dtype() if like is None else like.dtype
        names = [str(part.dtype).removeprefix("torch.") for part in tensors]
        dtypes = tuple(
            name if part.dtype != usual and name in DTYPES else None
            for part, name in zip(tensors, names, strict=True)
        )
        return replace(
            self,
            input_shapes=tuple(tuple(part.shape) for part in tensors),
            input_dtypes=dtypes if any(dtypes) else None,
            listed=is_list,
        )


def without_fetching(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return a factory's arguments as a card holds them: None for those that name weights.

    A file brings its weights, and must not have a factory fetch or read others.
    """
    return {
        key: None if key in WEIGHT_ARGUMENTS and value not in _FETCH_NOTHING else value
        for key, value in arguments.items()
    }


def _read_input(text: str) -> tuple[tuple[int, ...], str | None]:
    sizes, colon, dtype = text.partition(":")
    parts = [part.strip() for part in sizes.split(",")]
    is_shape = all(part.isascii() and part.isdecimal() and len(part) < 10 for part in parts)
    if not is_shape or (colon and dtype not in DTYPES):
        raise BadOption(
            f"--input takes the shape of one input as 1,3,32,32, with another dtype than the "
            f"network's as 1,16:int64, not {text!r}"
        )
    shape = tuple(int(part) for part in parts)
    if not _is_small_shape(shape):
        raise BadOption(f"--input {text} is of size 0, or more than a gigabyte")
    return shape, dtype or None


def _is_small_shape(shape: tuple[int, ...]) -> bool:
    return bool(shape) and min(shape) >= 1 and math.prod(shape) <= _MOST_NUMBERS


def card_of(model: nn.Module) -> HostCard | None:
    """Return the card that a host was loaded with, or None."""
    card: HostCard | None = model.__dict__.get("_attnsurgeon_card")
    return card


def give_card(model: nn.Module, card: HostCard) -> None:
    """Let the card travel with the model, through copies and pickles."""
    model.__dict__["_attnsurgeon_card"] = card

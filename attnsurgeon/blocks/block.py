"""What every attention block is: a module of a known width that keeps the shape of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from attnsurgeon.errors import BadOption

AROUND = ("post", "standard", "pre", "identity", "conv")
"""Placements of a block that reads one feature map and returns its like."""


@dataclass(frozen=True)
class Place:
    """The measured width of the spot a block is built for, and of the convolution it stands beside.

    `in_channels`, `stride` and `dilation` differ from their defaults only where a block replaces
    a convolution.
    """

    channels: int
    in_channels: int | None = None
    stride: tuple[int, int] = (1, 1)
    dilation: int = 1


class AttentionBlock(nn.Module):
    """Base of all blocks: (N, C, H, W) -> the same shape, exactly its input while gates are 0."""

    title: ClassVar[str]
    paper: ClassVar[str]
    formula: ClassVar[str]
    placements: ClassVar[tuple[str, ...]] = AROUND
    layouts: ClassVar[tuple[str, ...]] = ("NCHW",)
    convex: ClassVar[bool] = False
    """Whether its gate mixes branches, and so must stay in [0, 1]."""

    @classmethod
    def build(cls, place: Place, **options: Any) -> AttentionBlock:
        """Construct the block for a place in a network; `options` are those of the constructor."""
        return cls(place.channels, **options)


def hidden_width(channels: int, reduction: int, ratio: float | None) -> int:
    """Return the bottleneck width: C // reduction, or int(C * ratio) where a ratio is given.

    Never below 1: a layer of no units builds without a word and yields a constant map.

    Raises:
        BadOption: `reduction` is below 1 or `ratio` not in (0, 1].
    """
    if ratio is None:
        if reduction < 1:
            raise BadOption(f"reduction must be at least 1, not {reduction}")
        return max(1, channels // reduction)
    if not 0 < ratio <= 1:
        raise BadOption(f"ratio must be above 0 and at most 1, not {ratio}")
    return max(1, int(channels * ratio))


def one_of(name: str, value: str, known: tuple[str, ...]) -> str:
    """Return `value` if it is a known choice of the option `name`.

    Raises:
        BadOption: it is not.
    """
    if value not in known:
        raise BadOption(f"{name} must be one of {', '.join(known)}, not {value!r}")
    return value


def some_of(name: str, values: tuple[str, ...], known: tuple[str, ...]) -> tuple[str, ...]:
    """Return `values` if there is at least one, all are known choices and none stands twice.

    Raises:
        BadOption: otherwise.
    """
    if isinstance(values, str):
        values = (values,)
    if not values or len(set(values)) != len(values):
        raise BadOption(f"{name} must be different choices out of {', '.join(known)}, at least one")
    return tuple(one_of(name, value, known) for value in values)

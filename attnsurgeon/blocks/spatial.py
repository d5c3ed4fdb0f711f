"""Layers by the number of spatial axes: 1 (a sequence), 2 (an image), 3 (a video or volume)."""

from __future__ import annotations

from typing import Any

from torch import nn

from attnsurgeon.errors import BadOption

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_BATCH_NORMS: dict[int, type[nn.Module]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


def convolution(dims: int, *widths: int, **settings: Any) -> nn.Module:
    """Return a convolution over `dims` spatial axes; the arguments are those of nn.Conv2d."""
    return _CONVOLUTIONS[dims](*widths, **settings)


def batch_norm(dims: int, channels: int, **settings: Any) -> nn.Module:
    """Return a BatchNorm over maps of `dims` spatial axes; see nn.BatchNorm2d."""
    return _BATCH_NORMS[dims](channels, **settings)


def positions(dims: int) -> tuple[int, ...]:
    """Return the spatial axes of a channels-first map: (2, 3) of (N, C, H, W)."""
    return tuple(range(2, 2 + dims))


def per_axis(name: str, value: int | tuple[int, ...], dims: int) -> tuple[int, ...]:
    """Return one number for each spatial axis; one number stands for all.

    Raises:
        BadOption: another count of numbers, which are not all the same.
    """
    given = (value,) if isinstance(value, int) else tuple(value)
    if len(given) == dims:
        return given
    if len(set(given)) != 1:
        raise BadOption(f"{name} has {len(given)} numbers for {dims} axes: {given}")
    return given * dims if len(given) == 1 else given[:1] * dims

"""Layers by the number of spatial axes: 1 (a sequence), 2 (an image), 3 (a video or volume)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.errors import BadOption

_CONVOLUTIONS: dict[int, type[nn.Module]] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_AVERAGES: dict[int, type[nn.Module]] = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.AvgPool3d}
_MAXIMA: dict[int, type[nn.Module]] = {1: nn.MaxPool1d, 2: nn.MaxPool2d, 3: nn.MaxPool3d}
_BATCH_NORMS: dict[int, type[nn.Module]] = {
    1: nn.BatchNorm1d,
    2: nn.BatchNorm2d,
    3: nn.BatchNorm3d,
}


def convolution(dims: int, *shape: Any, **settings: Any) -> nn.Module:
    """Return a convolution over `dims` spatial axes; the arguments are those of nn.Conv2d."""
    return _CONVOLUTIONS[dims](*shape, **settings)


def batch_norm(dims: int, channels: int, **settings: Any) -> nn.Module:
    """Return a BatchNorm over maps of `dims` spatial axes; see nn.BatchNorm2d."""
    return _BATCH_NORMS[dims](channels, **settings)


def average_pool(dims: int, kernel_size: int, stride: int) -> nn.Module:
    """Return the mean of `kernel_size` neighbours along each axis; beyond the edge counts not."""
    shape = (kernel_size, stride, kernel_size // 2)
    return _AVERAGES[dims](*shape, count_include_pad=False)


def halving_pool(dims: int) -> nn.Module:
    """Return the maximum of pairs along the image axes; the first axis of a volume is kept."""
    return _MAXIMA[dims]((1, 2, 2) if dims == 3 else 2, ceil_mode=True)


def at_least_float32(x: Tensor) -> Tensor:
    """Return half-precision features as float32, whose squares and products do not overflow."""
    return x if x.dtype == torch.float64 else x.float()


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

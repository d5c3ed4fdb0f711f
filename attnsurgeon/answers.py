"""Answer at once, on meta tensors, what torch takes apart there: norms, and sampling on a grid.

Each becomes dozens of operators in Python, which is most of what a pass without numbers costs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class AnswersAtOnce(TorchDispatchMode):
    """Return empty tensors of the right shapes where operators are asked for nothing unusual.

    What is not plain (other dtypes, strides or widths, statistics that change) is left to torch.
    """

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Run any other operator as it is."""
        answer = _ANSWERS[func](*args) if func in _ANSWERS else None
        return func(*args, **(kwargs or {})) if answer is None else answer


def _batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor | None,
    variance: Tensor | None,
    training: bool,
    *_: float,
) -> tuple[Tensor, Tensor, Tensor] | None:
    if training or mean is None or variance is None or x.ndim < 2:
        return None
    if not _are_plain(x, (weight, bias, mean, variance), (x.shape[1],)):
        return None
    return x.new_empty(x.shape), x.new_empty(x.shape[1]), x.new_empty(x.shape[1])


def _layer_norm(
    x: Tensor, shape: list[int], weight: Tensor | None, bias: Tensor | None, *_: float
) -> tuple[Tensor, Tensor, Tensor] | None:
    axes = x.ndim - len(shape)
    if not shape or tuple(x.shape[axes:]) != tuple(shape):
        return None
    if not _are_plain(x, (weight, bias), tuple(shape)):
        return None
    statistics = (*x.shape[:axes], *(1 for _ in shape))
    return x.new_empty(x.shape), x.new_empty(statistics), x.new_empty(statistics)


def _grid_sampler(x: Tensor, grid: Tensor, *_: Any) -> Tensor | None:
    if grid.ndim != 4 or x.ndim != 4 or grid.shape[0] != x.shape[0] or grid.shape[3] != 2:
        return None
    if not _are_plain(x, (grid,), tuple(grid.shape)):
        return None
    return x.new_empty(*x.shape[:2], *grid.shape[1:3])


def _are_plain(x: Tensor, others: tuple[Tensor | None, ...], shape: tuple[int, ...]) -> bool:
    """Tell whether a meta tensor of float32, and others of one shape, are as they mostly are."""
    return (
        x.is_meta
        and x.dtype is torch.float32
        and x.is_contiguous()
        and all(
            t is None or (t.is_meta and t.dtype is x.dtype and tuple(t.shape) == shape)
            for t in others
        )
    )


_ANSWERS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten.native_batch_norm.default: _batch_norm,
    torch.ops.aten.native_layer_norm.default: _layer_norm,
    torch.ops.aten.grid_sampler_2d.default: _grid_sampler,
}

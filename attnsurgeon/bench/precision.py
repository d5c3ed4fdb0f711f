"""The number formats that a network can be timed in, and what else they set."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from attnsurgeon.bench.targets import Target

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}
OFFERED = ("fp32", "tf32", "bf16", "fp16")
"""What can be asked for; fp64 is only told of a network that has it."""


def precision_of(target: Target) -> str:
    """Return the precision that a target has of its own, by its first floating input."""
    for part in target.example:
        if isinstance(part, Tensor) and part.is_floating_point():
            known = (name for name, dtype in DTYPES.items() if dtype == part.dtype)
            return next(known, str(part.dtype).removeprefix("torch."))
    return "fp32"


def fit_target(
    target: Target, precision: str | None, *, channels_last: bool, train: bool
) -> Target:
    """Return the target in a precision and a memory layout: itself if it is so already.

    In training the weights stay as they are, and the step runs under autocast.
    """
    dtype = None if train or precision is None else DTYPES[precision]
    needs_cast = dtype is not None and dtype != DTYPES.get(precision_of(target))
    if target.model is None or not (needs_cast or channels_last):
        return target
    model: nn.Module = copy.deepcopy(target.model)
    if needs_cast:
        model = model.to(dtype)
    if channels_last:
        model = model.to(memory_format=torch.channels_last)
    return dataclasses.replace(
        target,
        model=model,
        example=tuple(
            part.to(dtype)
            if needs_cast and isinstance(part, Tensor) and part.is_floating_point()
            else part
            for part in target.example
        ),
    )


@contextlib.contextmanager
def borrowed_tf32(*, allowed: bool) -> Iterator[None]:
    """Let float32 products be rounded to TF32 on CUDA, or not; give torch's settings back."""
    cudnn = torch.backends.cudnn
    with cudnn.flags(
        enabled=cudnn.enabled,
        benchmark=cudnn.benchmark,
        deterministic=cudnn.deterministic,
        allow_tf32=allowed,
    ):
        before = torch.get_float32_matmul_precision()
        try:
            torch.set_float32_matmul_precision("high" if allowed else "highest")
            yield
        finally:
            torch.set_float32_matmul_precision(before)

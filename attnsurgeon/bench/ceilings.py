"""What the machine can do at most: copying memory and multiplying matrices, in the same run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from attnsurgeon.bench import timing
from attnsurgeon.bench.precision import DTYPES, borrowed_tf32

COPY_BYTES = {"cpu": 2**26, "cuda": 2**30}
"""Larger than the caches."""
LEAST_S = {"cpu": 2e-3, "cuda": 2e-3}
"""A product that takes longer than this is large enough to be at the ceiling."""
SMALLEST, LARGEST = 256, 8192
"""Rows of the square matrices."""
REPEATS = 3


@dataclass(frozen=True)
class Ceilings:
    """The best that was reached.

    Attributes:
        precision: of the matrices.
        bytes_per_s: read and written by copying a block of memory larger than the caches.
        macs_per_s: multiply-adds of a product of square matrices.
    """

    precision: str
    bytes_per_s: float
    macs_per_s: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values, to three digits."""
        return {
            "precision": self.precision,
            "bytes_per_s": float(f"{self.bytes_per_s:.3g}"),
            "macs_per_s": float(f"{self.macs_per_s:.3g}"),
        }


def measure_ceilings(device: torch.device, precision: str) -> Ceilings:
    """Measure both on a device, with torch's present number of threads; takes a second at most."""
    with torch.inference_mode(), borrowed_tf32(allowed=precision == "tf32"):
        copied = _copy_rate(device)
        return Ceilings(precision, copied, _product_rate(device, DTYPES[precision]))


def _copy_rate(device: torch.device) -> float:
    size = COPY_BYTES[device.type]
    source = torch.ones(size // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * size / _best(lambda: target.copy_(source), device)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    rows, best = SMALLEST, 0.0
    while rows <= LARGEST:
        matrix = torch.ones(rows, rows, dtype=dtype, device=device)
        out = torch.empty_like(matrix)
        taken = _best(lambda m=matrix, o=out: torch.mm(m, m, out=o), device)  # type: ignore[misc]
        best = max(best, rows**3 / taken)
        if taken > LEAST_S[device.type]:
            break
        rows *= 2
    return best


def _best(call: Callable[[], Any], device: torch.device) -> float:
    """Return the shortest of some calls in seconds: a ceiling is what is possible."""
    events = device if device.type == "cuda" else None
    runner = timing.Runner(call, lambda: None, events=events)
    timing.timed(runner, 1)
    return max(1e-9, min(timing.timed(runner, REPEATS)) / 1e3)

"""Figures to be read: no more digits than their interval supports, units that fit."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any


def supported(value: float, interval: Sequence[float] | None) -> str:
    """Return a value with the digits that its interval supports, two at most without one.

    Its uncertainty keeps two digits up to 35, one from there on (the Particle Data Group's rule).
    """
    half = (interval[1] - interval[0]) / 2 if interval else 0.05 * abs(value)
    if value == 0 or half <= 0 or not math.isfinite(half):
        return f"{value:.2g}"
    exponent = math.floor(math.log10(half))
    digits = 2 if half / 10.0**exponent < 3.55 else 1
    decimals = digits - 1 - exponent
    rounded = round(value, decimals)
    return f"{rounded:.{max(0, decimals)}f}"


def milliseconds(run: Mapping[str, Any], key: str) -> str:
    """Return a time of a run to the digits of its median's interval."""
    return supported(run[key], run["median95_ms"])


def throughput(run: Mapping[str, Any]) -> str:
    """Return the images per second to the digits of the median's interval."""
    interval = run["median95_ms"]
    bounds = [1e3 * run["batch"] / bound for bound in reversed(interval)] if interval else None
    return supported(run["images_per_s"], bounds)


def mebibytes(size: int | None) -> str:
    """Return a size in MiB, or nothing."""
    return "" if size is None else f"{size / 2**20:.3g}"


def percent(share: float | None) -> str:
    """Return a share as whole per cent, or nothing."""
    return "" if share is None else f"{100 * share:.0f} %" if share >= 0.01 else "< 1 %"


def count(number: int | None) -> str:
    """Return a whole number with its thousands apart, or nothing."""
    return "" if number is None else f"{number:,}"

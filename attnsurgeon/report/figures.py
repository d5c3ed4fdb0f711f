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
    """Return a time of a run, as `p95_ms`, to the digits of the wider of two intervals.

    One is the median's, from its spread between the rounds; the other that of the percentile
    among the calls, which is far wider in the tails.
    """
    own = percentile_interval(run["samples_ms"], float(key[1:-3])) if key[0] == "p" else None
    both = [interval for interval in (run["median95_ms"], own) if interval]
    return supported(run[key], max(both, key=lambda ends: ends[1] - ends[0], default=None))


def percentile_interval(samples: Sequence[float], percent: float) -> tuple[float, float]:
    """Return the 95 % interval of a percentile: the samples of the ranks that it may have.

    The number of calls below it is binomial (Conover, Practical Nonparametric Statistics, 3.2).
    """
    count, share = len(samples), percent / 100
    half = 1.96 * math.sqrt(count * share * (1 - share))
    ranks = math.floor(count * share - half), math.ceil(count * share + half)
    low, high = (min(max(rank, 0), count - 1) for rank in ranks)
    ordered = sorted(samples)
    return ordered[low], ordered[high]


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

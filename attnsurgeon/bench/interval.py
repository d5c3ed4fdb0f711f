"""How sure a measured ratio is: a robust mean, its interval, and the verdict in words.

The observations are logarithms of the blocks' times, as many of a target as of its baseline. What
disturbs a block makes it slower, never faster, so that the faster half of each tells more than the
middle; where what disturbed them could be taken off, the middle counts. Blocks of one round share
the memory that both sides happened to be given in it, and the machine's mood, so whole rounds are
drawn again, never single blocks. Drawing n rounds again shows a spread that is too small by
sqrt((n - 1) / n); corrected for that, it is the standard error of an interval of Student's t.
Percentiles of what was drawn would never reach beyond the lowest and the highest round, and five
rounds have both on one side of the truth once in sixteen times, however they are widened
(Hesterberg, The American Statistician 2015, on bootstraps of few observations).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

NOISE = "not distinguishable from noise"
RESAMPLES = 2000
QUANTILE = 0.975
"""Of Student's t, for 95 % between it and its negative."""
MAX_DECIMALS = 2
"""Of a percentage: two copies of one program seldom agree better than that."""

Part = tuple[float, float]
"""Of the sorted blocks, from the fastest: where those that are compared begin and end."""
FASTER_HALF: Part = (0.0, 0.5)
FASTEST_QUARTER: Part = (0.0, 0.25)
MIDDLE: Part = (0.1, 0.9)

Floats = NDArray[np.float64]
Rounds = Sequence[Sequence[float]]
"""Logs of the times of blocks, round by round."""


@dataclass(frozen=True)
class Estimate:
    """A ratio of times and its 95 % interval; 1 is no difference, above 1 is slower."""

    ratio: float
    low: float
    high: float


def trimmed_means(values: Floats, weights: Floats, part: Part) -> Floats:
    """Return, for each row of weights, the mean of that part of the sorted weighted values."""
    order = np.argsort(values)
    below = np.cumsum(weights[:, order], axis=1)
    first, last = (share * below[:, -1:] for share in part)
    inside = np.diff(np.clip(below, first, last), axis=1, prepend=first)
    found: Floats = inside @ values[order] / (last - first)[:, 0]
    return found


def estimate(
    own: Rounds, baseline: Rounds, *, part: Part = FASTER_HALF, unsure: float = 0.0, seed: int = 0
) -> Estimate:
    """Return the ratio of the same part of the blocks of each, with its 95 % interval.

    Args:
        own: logs of the times of a target's blocks; at least two rounds.
        baseline: the same of its baseline, as many in each round.
        part: of the blocks that is compared.
        unsure: a further standard error, in logs, of the ratio.
        seed: of the resampling; the same blocks give the same interval.
    """
    count = len(own)
    if count < 2:
        raise ValueError(f"an interval needs at least two rounds, not {count}")
    round_of = np.repeat(np.arange(count), [len(blocks) for blocks in own])
    sides = [np.concatenate([np.asarray(blocks) for blocks in side]) for side in (own, baseline)]

    def logs(drawn: Floats) -> Floats:
        mine, others = (trimmed_means(side, drawn, part) for side in sides)
        difference: Floats = mine - others
        return difference

    # How often each round is drawn, when as many are drawn as there are, with replacement.
    drawn = np.random.default_rng(seed).multinomial(count, [1 / count] * count, size=RESAMPLES)
    found = [logs(part[:, round_of].astype(np.float64)) for part in np.split(drawn, 10)]
    ratio = float(logs(np.ones((1, len(round_of))))[0])
    half = half_width(math.hypot(float(np.concatenate(found).std()), unsure), count)
    return Estimate(*(math.exp(value) for value in (ratio, ratio - half, ratio + half)))


def half_width(spread: float, count: int) -> float:
    """Return half of a 95 % interval from the spread of `count` rounds that were drawn again.

    A mean that leaves out the extremes knows its own spread less well than one of all: it has a
    degree of freedom less.
    """
    return student_quantile(max(1, count - 2)) * math.sqrt(count / (count - 1)) * spread


def student_quantile(degrees: int) -> float:
    """Return the 97.5 % quantile of Student's t (Abramowitz and Stegun 26.7.5).

    Their series is a tenth short of it for one degree of freedom; there, and for two, it is exact.
    """
    if degrees == 1:
        return math.tan(math.pi * (QUANTILE - 0.5))
    if degrees == 2:
        return (2 * QUANTILE - 1) / math.sqrt(2 * QUANTILE * (1 - QUANTILE))
    z = NormalDist().inv_cdf(QUANTILE)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(degrees) ** (i + 1) for i, term in enumerate(terms))


def verdict(found: Estimate) -> str:
    """Return "+6.2 % [5.1, 7.4]", or NOISE where the interval holds 1 at the digits it supports."""
    change, low, high = (100 * (value - 1) for value in (found.ratio, found.low, found.high))
    decimals = supported_decimals((high - low) / 2)
    change, low, high = (round(value, decimals) for value in (change, low, high))
    if low <= 0 <= high:
        return NOISE
    places = max(0, decimals)
    return f"{change:+.{places}f} % [{low:.{places}f}, {high:.{places}f}]"


def supported_decimals(half_width: float) -> int:
    """Return how many decimals of a percentage its uncertainty supports, MAX_DECIMALS at most.

    The uncertainty keeps two digits up to 35, one from there on (the Particle Data Group's rule):
    1.15 is worth one decimal and so is 0.85, but 0.25 is worth two and 5 none; 50 is worth -1,
    which leaves the tens.
    """
    if half_width <= 0:
        return MAX_DECIMALS
    exponent = math.floor(math.log10(half_width))
    digits = 2 if half_width / 10.0**exponent < 3.55 else 1
    return min(MAX_DECIMALS, digits - 1 - exponent)

"""The ratio of two runners of a race, by what the machine let pass undisturbed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from attnsurgeon.bench.interval import (
    FASTER_HALF,
    FASTEST_QUARTER,
    MIDDLE,
    Estimate,
    Part,
    estimate,
)
from attnsurgeon.bench.rounds import Race

HOW = {
    MIDDLE: "what is left of them without their waiting for a core is compared",
    FASTEST_QUARTER: "their fastest quarter is compared",
}
"""What is done about calls that were held up, in words."""


def compared(race: Race) -> tuple[Race, Part]:
    """Return what is compared of a race, and which part of its blocks.

    It is the faster half. Of a race that was disturbed (see Race.is_disturbed) the waiting for a
    core is taken off and the middle compared; where that does not explain what held its blocks
    up, their fastest quarter.
    """
    if not race.is_disturbed():
        return race, FASTER_HALF
    left = race.without_waits()
    return (race, FASTEST_QUARTER) if left.is_disturbed() else (left, MIDDLE)


def compared_alike(races: Sequence[Race]) -> tuple[Sequence[Race], Part]:
    """Return what is compared of several races: of all the same part, found in the same way."""
    found = [compared(race) for race in races]
    if len({part for _, part in found}) > 1:
        return races, FASTEST_QUARTER
    return [race for race, _ in found], found[0][1]


def ratio_of(races: Race | Sequence[Race], runner: int, baseline: int = 0) -> Estimate:
    """Return how many times as long as the baseline a runner takes, with its 95 % interval.

    Args:
        races: one, or several of the same runners.
        runner: its number.
        baseline: the number of what it is compared with.
    """
    held, part = compared_alike([races] if isinstance(races, Race) else races)
    own, other = (list(chain(*(r.log_blocks(i) for r in held))) for i in (runner, baseline))
    return estimate(own, other, part=part)

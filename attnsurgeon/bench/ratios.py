"""The ratio of two runners of a race, by what the machine let pass undisturbed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import NamedTuple

from attnsurgeon.bench.interval import (
    FASTER_HALF,
    FASTEST_QUARTER,
    MIDDLE,
    Estimate,
    Part,
    estimate,
)
from attnsurgeon.bench.rounds import Race
from attnsurgeon.bench.waits import without_waits

HOW = {
    MIDDLE: "they are compared without the time that they waited for a core",
    FASTEST_QUARTER: "the fastest quarter of them is compared",
}
"""What is done about calls that were held up, in words."""


class Compared(NamedTuple):
    """What is compared of races.

    Attributes:
        races: their blocks, perhaps without what was taken off.
        part: of the blocks of each runner.
        unsure: standard error, in logs, of what was taken off.
    """

    races: Sequence[Race]
    part: Part
    unsure: float = 0.0


def compared(*races: Race) -> Compared:
    """Return what is compared of races of the same runners: of all the same part, found alike.

    It is the faster half. Of races of which any runner was disturbed (see Race.is_disturbed) the
    waiting for a core is taken off and the middle compared; where that does not explain what held
    its blocks up, or not in all of them, their fastest quarter.
    """
    disturbed = [race.is_disturbed() for race in races]
    if not any(disturbed):
        return Compared(races, FASTER_HALF)
    left = [without_waits(race) for race in races]
    known = [each for each in left if each is not None]
    if not all(disturbed) or len(known) < len(left):
        return Compared(races, FASTEST_QUARTER)
    return Compared([race for race, _ in known], MIDDLE, max(unsure for _, unsure in known))


def ratio_of(races: Race | Sequence[Race], runner: int, baseline: int = 0) -> Estimate:
    """Return how many times as long as the baseline a runner takes, with its 95 % interval.

    Args:
        races: one, or several of the same runners.
        runner: its number.
        baseline: the number of what it is compared with.
    """
    held, part, unsure = compared(*([races] if isinstance(races, Race) else races))
    own, other = (list(chain(*(r.log_blocks(i) for r in held))) for i in (runner, baseline))
    return estimate(own, other, part=part, unsure=unsure)

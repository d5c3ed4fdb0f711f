"""The ratio of two runners of a race, by what the machine let pass undisturbed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from attnsurgeon.bench.interval import FASTER_HALF, FASTEST_QUARTER, Estimate, estimate
from attnsurgeon.bench.rounds import Race


def ratio_of(races: Race | Sequence[Race], runner: int, baseline: int = 0) -> Estimate:
    """Return how many times as long as the baseline a runner takes, with its 95 % interval.

    The faster half of the blocks of each is compared; where one of the two was disturbed (see
    Race.is_disturbed), the fastest quarter.

    Args:
        races: one, or several of the same runners.
        runner: its number.
        baseline: the number of what it is compared with.
    """
    held = [races] if isinstance(races, Race) else races
    own, other = (list(chain(*(r.log_blocks(i) for r in held))) for i in (runner, baseline))
    is_disturbed = any(race.is_disturbed(i) for race in held for i in (runner, baseline))
    return estimate(own, other, share=FASTEST_QUARTER if is_disturbed else FASTER_HALF)

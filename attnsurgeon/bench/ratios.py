"""The ratio of two runners of a race, by pairs or, of a disturbed machine, by what it let pass."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from attnsurgeon.bench.interval import Estimate, estimate, estimate_fastest
from attnsurgeon.bench.rounds import Race


def ratio_of(races: Race | Sequence[Race], runner: int, baseline: int = 0) -> Estimate:
    """Return how many times as long as the baseline a runner takes, with its 95 % interval.

    Pairs of blocks are compared, since neighbours share the machine's mood. Where one of the two
    was disturbed (see Race.is_disturbed), the fastest quarter of each is.

    Args:
        races: one, or several of the same runners.
        runner: its number.
        baseline: the number of what it is compared with.
    """
    held = [races] if isinstance(races, Race) else races
    if any(race.is_disturbed(i) for race in held for i in (runner, baseline)):
        own, other = (list(chain(*(r.log_blocks(i) for r in held))) for i in (runner, baseline))
        return estimate_fastest(own, other)
    return estimate(list(chain(*(race.log_ratios(runner, baseline) for race in held))))

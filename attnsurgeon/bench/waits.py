"""What is left of a race without its threads' waiting for a core, where that explains it."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from attnsurgeon.bench.rounds import DISTURBED, Race

LARGEST_COST = 1.5
"""Of a ms of waiting, in ms: it is 1 where one thread waits at a time, and less where several do;
with caches that others filled meanwhile it may be more."""
LEAST_EXPLAINED = 0.5
"""Of the variance of a runner's blocks. It was above 0.9 beside a process that spins."""
CLEARLY = 3.0
"""Standard errors, by which a runner's cost must be another than all runners' to be used."""
LEAST_LEFT, MOST_EMPTY = 0.01, 0.05
"""Of a block's time is left at least, and the share of blocks of which no more is."""

Floats = NDArray[np.float64]


def without_waits(race: Race) -> tuple[Race, float] | None:
    """Return the race less what waiting for a core cost its calls; None where that is not known.

    What a ms of waiting costs is found by least squares over the blocks, for all runners together
    or, where they differ clearly, for each: threads that wait at the same time are accounted one by
    one, and a network may have more of them. It is not known where it comes out implausible,
    explains too little, or leaves blocks that still are far apart.

    Returns:
        The race, and the standard error of the log of a ratio that comes from those costs.
    """
    if not race.spans or len(race.spans) != len(race.rounds):
        return None
    spans = np.array([span for passes in race.spans for span in passes])  # pass, runner, span
    calls, waits = spans[..., 0], spans[..., 1]
    known = _costs(calls, waits)
    if known is None:
        return None
    costs, errors = known
    least = LEAST_LEFT * calls
    left = np.maximum(calls - costs * waits, least)
    rows = iter(left.tolist())
    rounds = tuple(tuple([next(rows) for _ in passes]) for passes in race.spans)
    found = replace(race, rounds=rounds, spans=())
    spread = np.subtract(*np.percentile(_beside_their_round(found), (75, 25), axis=0))
    if (spread > DISTURBED).any() or ((left <= least).mean(axis=0) > MOST_EMPTY).any():
        return None
    unsure = errors * waits.mean(axis=0) / np.median(left, axis=0)
    return found, math.sqrt(2) * float(unsure.max())


def _costs(calls: Floats, waits: Floats) -> tuple[Floats, Floats] | None:
    """Return for each runner what a ms of waiting costs, and its standard error, 0 if shared."""
    off_calls, off_waits = calls - calls.mean(axis=0), waits - waits.mean(axis=0)
    shared, own = (off_calls * off_waits).sum(axis=0), (off_waits**2).sum(axis=0)
    whole = (off_calls**2).sum(axis=0)
    if len(calls) < 3 or not own.all() or not whole.all():
        return None
    costs, explained = shared / own, shared**2 / own / whole
    plausible = (costs > 0) & (costs <= LARGEST_COST) & (explained >= LEAST_EXPLAINED)
    if not plausible.all():
        return None
    errors = np.sqrt(np.maximum(0, 1 - explained) * whole / (len(calls) - 2) / own)
    common = shared.sum() / own.sum()
    if (np.abs(costs - common) <= CLEARLY * errors).all():
        return np.full_like(costs, common), np.zeros_like(costs)
    return costs, errors


def _beside_their_round(race: Race) -> Floats:
    """Return how far each block, in logs, lies from the median of its round."""
    rounds = [np.log(passes) for passes in race.rounds]
    return np.concatenate([logs - np.median(logs, axis=0) for logs in rounds])

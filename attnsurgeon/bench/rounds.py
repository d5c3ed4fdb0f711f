"""What a race measured, round by round, and whether it has settled."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from attnsurgeon.bench.interval import student_quantile

MIN_ROUNDS, MAX_ROUNDS = 5, 30
"""Fewer rounds than 5 say nothing about their spread."""
RATIO_TOLERANCE, TIME_TOLERANCE = 0.005, 0.02
"""Smaller differences between the halves of a measurement are none."""
SETTLED_QUANTILES = 1.5
"""Of Student's t at 97.5 %: one quiet measurement in a hundred or two goes on for nothing."""

DISTURBED = 0.3
"""A quarter of the blocks take longer than the fastest of their window by this, in logs."""
WINDOW = 6
"""Blocks at least: the fastest of fewer may have been held up itself."""

Blocks = list[float]
"""Median call of one block in ms, for each runner."""


class Span(NamedTuple):
    """What one block's calls took in the mean, and what their threads waited for a core, in ms."""

    call_ms: float
    waited_ms: float


@dataclass(frozen=True)
class Race:
    """What was measured.

    Attributes:
        samples_ms: every timed call, for each runner.
        rounds: passes, round by round; a pass holds the block median of each runner in ms.
        planned: rounds that were to be enough.
        enqueued: for each runner timed by events, the share of its time in which the host was
            still busy launching it; 1 is a device that waits for the host.
        spans: passes, round by round, with the span of each runner.
    """

    samples_ms: tuple[tuple[float, ...], ...]
    rounds: tuple[tuple[Blocks, ...], ...]
    planned: int = MIN_ROUNDS
    enqueued: tuple[float | None, ...] = ()
    spans: tuple[tuple[list[Span], ...], ...] = ()

    def log_ratios(self, runner: int, baseline: int = 0) -> list[list[float]]:
        """Return, round by round, the log of a runner's block over the baseline's of that pass.

        A pass and the next one, in which the order is reversed, make one ratio: whoever runs
        twice in a row finds warm caches, which makes single ratios come in two kinds.
        """
        found = []
        for passes in self.rounds:
            logs = [math.log(blocks[runner] / blocks[baseline]) for blocks in passes]
            pairs = list(zip(logs[::2], logs[1::2], strict=False))
            found.append([(one + other) / 2 for one, other in pairs] or logs)
        return found

    def log_blocks(self, runner: int) -> list[list[float]]:
        """Return, round by round, the logs of a runner's blocks in ms."""
        return [[math.log(blocks[runner]) for blocks in passes] for passes in self.rounds]

    def is_disturbed(self, runner: int | None = None) -> bool:
        """Tell whether so many of a runner's blocks were held up that their middle means nothing.

        Without a number, whether those of any were. Two programs on one core make calls of two
        kinds, of which now the one and now the other is the more frequent.
        """
        if runner is None:
            return any(self.is_disturbed(i) for i in range(len(self.samples_ms)))
        above = np.concatenate([logs - logs.min() for logs in _windows(self.log_blocks(runner))])
        return bool(np.percentile(above, 75) > DISTURBED)

    def log_times(self, runner: int) -> list[float]:
        """Return the log of each round's median block in ms."""
        return [
            math.log(statistics.median(row[runner] for row in passes)) for passes in self.rounds
        ]


def _windows(rounds: Sequence[Sequence[float]]) -> list[NDArray[np.float64]]:
    """Return the values of neighbouring rounds in parts of WINDOW values at least, if there are."""
    values = np.concatenate([np.asarray(own) for own in rounds])
    ends = np.cumsum([len(own) for own in rounds])[:-1]
    cuts: list[int] = []
    for end in ends:
        if min(end - (cuts[-1] if cuts else 0), len(values) - end) >= WINDOW:
            cuts.append(int(end))
    return np.split(values, cuts)


class RaceInterrupted(KeyboardInterrupt):
    """An interrupt after enough rounds to say something: `race` holds them."""

    def __init__(self, race: Race) -> None:
        super().__init__()
        self.race = race


def is_settled(race: Race) -> bool:
    """Tell whether the last planned rounds' second half agrees with their first.

    Of several runners the ratios have to agree, which drift of the machine does not touch; of a
    lone one, the times. What is disturbed never settles.
    """
    count = len(race.samples_ms)
    if race.is_disturbed():
        return False
    if count > 1:
        rows = [[statistics.fmean(own) for own in race.log_ratios(i)] for i in range(1, count)]
        return all(halves_agree(row[-race.planned :], RATIO_TOLERANCE) for row in rows)
    return halves_agree(race.log_times(0)[-race.planned :], TIME_TOLERANCE)


def halves_agree(values: Sequence[float], tolerance: float) -> bool:
    """Tell whether the means of both halves differ by less than their own spread explains."""
    middle = len(values) // 2
    one, other = values[:middle], values[middle:]
    if len(one) < 2:
        return False
    spread = math.sqrt(
        (statistics.variance(one) * (len(one) - 1) + statistics.variance(other) * (len(other) - 1))
        / (len(values) - 2)
        * (1 / len(one) + 1 / len(other))
    )
    explained = SETTLED_QUANTILES * student_quantile(len(values) - 2) * spread
    return abs(statistics.fmean(one) - statistics.fmean(other)) <= max(tolerance, explained)

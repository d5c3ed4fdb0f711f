"""Time several runners against each other, so that nothing but themselves makes a difference.

A pass runs one block of calls of each runner; the order of the runners changes from pass to
pass, so that each is as often first as last and drift hits all alike. Block k of one and block k
of another are a pair. A run is cut into rounds: before each, every runner moves to new memory,
since where a copy happens to lie makes it up to 1 % faster or slower than its twin for good.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnsurgeon.bench.quiet import paused_collector

BLOCK_S = 0.08
"""Long enough for a clock, short enough for many pairs; at least one call."""
MIN_PASSES = 50
"""Short measurements have shorter blocks instead of fewer of them."""
MIN_ROUNDS, MAX_ROUNDS = 5, 16
"""Fewer rounds than 5 say nothing about their spread."""
MOVING_SHARE = 0.25
"""Of the time may go into moving, before there are fewer rounds."""
WARM_CALLS = 2
"""After each move: the first call of a runner allocates."""

clock_ns: Callable[[], int] = time.perf_counter_ns
"""The wall clock, for every decision and measurement here; a test may put another in its place."""

Call = Callable[[], Any]
Blocks = list[float]
"""Median call of one block in ms, for each runner."""


@dataclass(frozen=True)
class Runner:
    """One network on one engine with its input, ready to be called.

    Attributes:
        call: runs the network once.
        move: gives the network new memory; what `call` computes stays the same.
        provider: the ONNX Runtime provider that really runs it.
        events: the CUDA device whose events time it; None for the wall clock.
    """

    call: Call
    move: Callable[[], None]
    provider: str | None = None
    events: torch.device | None = None


@dataclass(frozen=True)
class Race:
    """What was measured.

    Attributes:
        samples_ms: every timed call, for each runner.
        rounds: passes, round by round; a pass holds the block median of each runner in ms.
    """

    samples_ms: tuple[tuple[float, ...], ...]
    rounds: tuple[tuple[Blocks, ...], ...]

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


def race(
    runners: Sequence[Runner], seconds: float, tell: Callable[[float], None] = lambda share: None
) -> Race:
    """Time all runners in alternating blocks for about `seconds` in all, moving included.

    However slow they are, each gets MIN_ROUNDS timed calls.

    Args:
        runners: what to time; all of them are warmed up together first.
        seconds: of wall-clock time.
        tell: is told the share that is done, between rounds.
    """
    samples: list[list[float]] = [[] for _ in runners]
    rounds: list[tuple[Blocks, ...]] = []
    # Gradients are off, and parameters can still be moved between the rounds.
    with torch.inference_mode(), paused_collector():
        gc.collect()
        calls = _calls_per_block(runners, seconds, _warm_up(runners, seconds / 10))
        start = _now_s()
        planned, number = MIN_ROUNDS, 0
        while len(rounds) < planned:
            moving = _move(runners, len(rounds), order_of_pass(number, len(runners)))
            if not rounds:
                planned = planned_rounds(seconds, moving)
            until = start + seconds * (len(rounds) + 1) / planned
            passes: list[Blocks] = []
            while not passes or _now_s() < until:
                for _ in range(2):  # both orders
                    passes.append(_run_pass(runners, number, calls, samples))
                    number += 1
                    if len(passes) == 1 and _now_s() >= until:
                        break  # too slow for that: the next round begins with the other order
            rounds.append(tuple(passes))
            tell(len(rounds) / planned)
    return Race(tuple(tuple(own) for own in samples), tuple(rounds))


def planned_rounds(seconds: float, moving: float) -> int:
    """Return the number of rounds for which moving takes its share of the time at most."""
    affordable = int(MOVING_SHARE * seconds / max(moving, 1e-9))
    return max(MIN_ROUNDS, min(MAX_ROUNDS, affordable))


def order_of_pass(number: int, count: int) -> list[int]:
    """Return who runs when in a pass: forwards, backwards, then from the next one on."""
    shift = number // 2 % count if count > 2 else 0  # of two, the next one on is backwards too
    order = [(i + shift) % count for i in range(count)]
    return order[::-1] if number % 2 else order


def _now_s() -> float:
    return clock_ns() / 1e9


def _warm_up(runners: Sequence[Runner], seconds: float) -> float:
    """Run all in turn, at least three times and for up to a second; return a call's mean time."""
    until = _now_s() + min(1.0, seconds)
    times: list[list[float]] = [[] for _ in runners]
    while len(times[0]) < 3 or _now_s() < until:
        for own, runner in zip(times, runners, strict=True):
            own += timed(runner, 1)
    return statistics.mean(statistics.median(own[1:]) for own in times) / 1e3


def _calls_per_block(runners: Sequence[Runner], seconds: float, call_s: float) -> int:
    block_s = min(BLOCK_S, seconds / (MIN_PASSES * len(runners)))
    return max(1, round(block_s / max(call_s, 1e-9)))


def _move(runners: Sequence[Runner], number: int, order: Sequence[int]) -> float:
    """Move all, beginning with another one each time; return how long it took.

    They are warmed up against the order of the pass that follows, so that its first runner is
    as warm as after any other pass.
    """
    start = _now_s()
    with torch.inference_mode(mode=False):
        for i in range(len(runners)):
            runners[(number + i) % len(runners)].move()
    gc.collect(1)  # what was made since the last time; the old generation takes 0.1 s
    for i in reversed(order):
        timed(runners[i], WARM_CALLS)
    return _now_s() - start


def _run_pass(
    runners: Sequence[Runner], number: int, calls: int, samples: list[list[float]]
) -> Blocks:
    medians = [0.0] * len(runners)
    for i in order_of_pass(number, len(runners)):
        block = timed(runners[i], calls)
        samples[i] += block
        medians[i] = statistics.median(block)
    return medians


def timed(runner: Runner, calls: int) -> list[float]:
    """Return the time of each of `calls` calls in ms."""
    if runner.events is not None:
        return _timed_by_events(runner.call, calls, runner.events)
    clock, call = clock_ns, runner.call
    marks = [clock()]
    for _ in range(calls):
        call()
        marks.append(clock())
    return [(after - before) / 1e6 for before, after in zip(marks, marks[1:], strict=False)]


def _timed_by_events(call: Call, calls: int, device: torch.device) -> list[float]:
    """Time on the device itself: the calls only enqueue, so that a wall clock would see nothing."""
    with torch.cuda.device(device):
        event: Any = torch.cuda.Event
        marks = [event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda.synchronize()
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        torch.cuda.synchronize()
    return [before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False)]

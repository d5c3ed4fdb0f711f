"""Time several runners against each other, so that nothing but themselves makes a difference.

A pass runs one block of calls of each runner; the order of the runners changes from pass to
pass, so that each is as often first as last and drift hits all alike. Block k of one and block k
of another are a pair. A run is cut into rounds: before each, every runner moves to new memory,
since where a copy happens to lie makes it up to 1 % faster or slower than its twin for good.
When the time is over and the last rounds do not agree with those before, more are run.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from attnsurgeon.bench.quiet import paused_collector
from attnsurgeon.bench.rounds import (
    MAX_ROUNDS,
    MIN_ROUNDS,
    Blocks,
    Race,
    RaceInterrupted,
    Span,
    is_settled,
)
from attnsurgeon.bench.waiting import waited_ns

BLOCK_S = 0.04
"""Long enough for a clock, short enough for many pairs; at least one call."""
MIN_PASSES = 50
"""Short measurements have shorter blocks instead of fewer of them."""
MOVING_SHARE = 0.25
"""Of the time may go into moving, before there are fewer rounds."""
WARM_CALLS = 2
"""After each move: the first call of a runner allocates."""
PATIENCE = 2.0
"""Times the planned rounds: no more are run, settled or not."""

clock_ns: Callable[[], int] = time.perf_counter_ns
"""The wall clock, for every decision and measurement here; a test may put another in its place."""

Call = Callable[[], Any]


@dataclass(frozen=True)
class Runner:
    """One network on one engine with its input, ready to be called.

    Attributes:
        call: runs the network once.
        move: gives the network new memory; what `call` computes stays the same.
        provider: the ONNX Runtime provider that really runs it.
        events: the CUDA device whose events time it; None for the wall clock.
        first: the first call, where it does more than the others, such as compiling; what it
            returns is the network's output.
        is_training: whether a call needs gradients.
        held_bytes: of host memory that was taken before it was made ready.
        profile: returns the engine's own per-operator table.
    """

    call: Call
    move: Callable[[], None]
    provider: str | None = None
    events: torch.device | None = None
    first: Call | None = None
    is_training: bool = False
    held_bytes: int = 0
    profile: Callable[[], Any] | None = None


Tell = Callable[[float, Race], None]


def race(runners: Sequence[Runner], seconds: float, tell: Tell | None = None) -> Race:
    """Time all runners in alternating blocks for about `seconds` in all, moving included.

    However slow they are, each gets MIN_ROUNDS timed calls. Where the last rounds disagree with
    those before them it goes on, to PATIENCE times the rounds at most.

    Args:
        runners: what to time; all of them are warmed up together first.
        seconds: of wall-clock time.
        tell: is told the share that is done and what was found so far, between rounds.

    Raises:
        RaceInterrupted: an interrupt came after two rounds or more.
    """
    samples: list[list[float]] = [[] for _ in runners]
    launched: list[list[float]] = [[] for _ in runners]
    rounds: list[tuple[Blocks, ...]] = []
    spans: list[tuple[list[Span], ...]] = []
    planned, number = MIN_ROUNDS, 0

    def found() -> Race:
        shares = tuple(statistics.median(own) if own else None for own in launched)
        held = tuple(map(tuple, samples))
        return Race(held, tuple(rounds), planned, shares, tuple(spans))

    # Gradients are off, and parameters can still be moved between the rounds.
    with _mode(runners), paused_collector():
        gc.collect()
        calls = _calls_per_block(runners, seconds, _warm_up(runners, seconds / 10))
        start = _now_s()
        most = planned
        try:
            while len(rounds) < planned or (len(rounds) < most and not is_settled(found())):
                moving = _move(runners, len(rounds), order_of_pass(number, len(runners)))
                if not rounds:
                    planned = planned_rounds(seconds, moving)
                    most = round(PATIENCE * planned)
                until = start + seconds * (len(rounds) + 1) / planned
                passes: list[list[Span]] = []
                medians: list[Blocks] = []
                while not medians or _now_s() < until:
                    for _ in range(2):  # both orders
                        row = _run_pass(runners, number, calls, samples, launched)
                        medians.append([statistics.median(block) for block, _ in row])
                        passes.append([Span(statistics.fmean(block), ms) for block, ms in row])
                        number += 1
                        if len(medians) == 1 and _now_s() >= until:
                            break  # too slow for that: the next round begins with the other order
                rounds.append(tuple(medians))
                spans.append(tuple(passes))
                if tell is not None:
                    tell(min(1.0, len(rounds) / planned), found())
        except KeyboardInterrupt:
            if len(rounds) < 2:
                raise
            raise RaceInterrupted(found()) from None
    return found()


def _mode(runners: Sequence[Runner]) -> Any:
    return torch.inference_mode(mode=not any(runner.is_training for runner in runners))


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
    runners: Sequence[Runner],
    number: int,
    calls: int,
    samples: list[list[float]],
    launched: list[list[float]],
) -> list[tuple[list[float], float]]:
    """Return each runner's block of calls in ms, and how long a call's threads waited for a core.

    That is asked for between the blocks, and is 0 for what a device's events time.
    """
    found: list[tuple[list[float], float]] = [([], 0.0)] * len(runners)
    for i in order_of_pass(number, len(runners)):
        before = waited_ns()
        block = timed(runners[i], calls, launched[i])
        waited = max(0, waited_ns() - before)  # less than before where a thread has ended
        found[i] = block, 0.0 if runners[i].events else waited / 1e6 / calls
        samples[i] += block
    return found


def timed(runner: Runner, calls: int, launched: list[float] | None = None) -> list[float]:
    """Return the time of each of `calls` calls in ms.

    Of a runner that is timed by events, `launched` gets the share of that time in which the host
    was launching.
    """
    if runner.events is not None:
        return _timed_by_events(runner.call, calls, runner.events, launched)
    clock, call = clock_ns, runner.call
    marks = [clock()]
    for _ in range(calls):
        call()
        marks.append(clock())
    return [(after - before) / 1e6 for before, after in zip(marks, marks[1:], strict=False)]


def _timed_by_events(
    call: Call, calls: int, device: torch.device, launched: list[float] | None
) -> list[float]:
    """Time on the device itself: the calls only enqueue, so that a wall clock would see nothing."""
    with torch.cuda.device(device):
        event: Any = torch.cuda.Event
        marks = [event(enable_timing=True) for _ in range(calls + 1)]
        torch.cuda.synchronize()
        start = clock_ns()
        marks[0].record()
        for mark in marks[1:]:
            call()
            mark.record()
        busy = clock_ns() - start
        torch.cuda.synchronize()
        whole = clock_ns() - start
    if launched is not None:
        launched.append(busy / max(whole, 1))
    return [before.elapsed_time(after) for before, after in zip(marks, marks[1:], strict=False)]

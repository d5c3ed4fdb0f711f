"""The engine's own per-operator table: who takes how long in one warm run."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

CALLS = 3
"""Profiled runs of torch; times are of one."""
_LOG_LEVEL = "KINETO_LOG_LEVEL"


@dataclass(frozen=True)
class Operator:
    """All runs of one operator in one run of the network.

    Attributes:
        name: as the engine calls it.
        calls: how often.
        ms: what they took themselves, without operators inside them.
        share: of the sum over all operators, 0 to 1.
    """

    name: str
    calls: int
    ms: float
    share: float

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {
            "name": self.name,
            "calls": self.calls,
            "ms": round(self.ms, 4),
            "share": round(self.share, 4),
        }


def total_operators(spans: Iterable[tuple[str, float]], runs: int = 1) -> list[Operator]:
    """Return one row for each name, the costliest first, of `runs` runs of (name, ms)."""
    calls: dict[str, int] = defaultdict(int)
    times: dict[str, float] = defaultdict(float)
    for name, ms in spans:
        calls[name] += 1
        times[name] += ms
    return _rows({name: (calls[name], times[name]) for name in calls}, runs)


def _rows(totals: dict[str, tuple[int, float]], runs: int) -> list[Operator]:
    whole = sum(ms for _, ms in totals.values()) or 1.0
    rows = [
        Operator(name, max(1, round(calls / runs)), ms / runs, ms / whole)
        for name, (calls, ms) in totals.items()
        if ms > 0
    ]
    return sorted(rows, key=lambda row: -row.ms)


def profile_torch(
    call: Callable[[], Any], device: torch.device, *, is_training: bool
) -> list[Operator]:
    """Return the table of torch's profiler: time on the device itself, without what is inside."""
    is_cuda = device.type == "cuda"
    kinds = [torch.profiler.ProfilerActivity.CPU]
    if is_cuda:
        kinds.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.inference_mode(mode=not is_training):
        call()
        with _quiet_collector(), torch.profiler.profile(activities=kinds) as profiler:
            for _ in range(CALLS):
                call()
            if is_cuda:
                torch.cuda.synchronize(device)
    totals = {}
    for row in profiler.key_averages():
        own_us = row.self_device_time_total if is_cuda else row.self_cpu_time_total
        totals[row.key] = (row.count, own_us / 1e3)
    return _rows(totals, CALLS)


@contextmanager
def _quiet_collector() -> Iterator[None]:
    """Keep torch's collector from telling stderr that it starts, stops and finds no GPU."""
    before = os.environ.get(_LOG_LEVEL)
    os.environ[_LOG_LEVEL] = "99"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_LOG_LEVEL]
        else:
            os.environ[_LOG_LEVEL] = before

"""What other instruments say of the same network: those that the bench is held against."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils import benchmark

import attnsurgeon
from attnsurgeon.bench import timing
from attnsurgeon.bench.exported import session_for
from attnsurgeon.bench.interval import Estimate
from attnsurgeon.bench.ratios import ratio_of
from attnsurgeon.gate import named_gates

TOOL_RUNS = 8
"""Of ONNX Runtime's test tool in one turn: it tells the mean of a run only."""
FEWEST = 2
"""Times, however slow they are: fewer have no quartiles."""


def by_torch(path: Path, image: Tensor, seconds: float, threads: int) -> tuple[float, float]:
    """Return the median in ms by torch.utils.benchmark, and its relative spread."""
    model = attnsurgeon.load_model(path)
    for gate in named_gates(model).values():
        torch.nn.init.constant_(gate, 0.5)
    timer = benchmark.Timer(
        "model(image)", globals={"model": model, "image": image}, num_threads=threads
    )
    with torch.inference_mode():
        measured = timer.blocked_autorange(min_run_time=seconds)
    return 1e3 * measured.median, measured.iqr / measured.median / 2


def by_onnxruntime(
    path: Path, image: Tensor, seconds: float, threads: int
) -> tuple[list[float], list[float]]:
    """Return the times in ms of the same calls by our clock, and by ONNX Runtime's own profiler.

    Its profiler itself makes the calls slower: by 1 to 6 % with one thread, by up to 20 % with two.
    """
    session = session_for(path, threads=threads, profile_to=path.with_suffix(""))
    feed = {session.get_inputs()[0].name: image.numpy()}
    runner = timing.Runner(lambda: session.run(None, feed), lambda: None)
    until = time.perf_counter() + seconds
    ours: list[float] = []
    while len(ours) < 2 + FEWEST or time.perf_counter() < until:
        ours += timing.timed(runner, 1)
    return ours[2:], _profiled_ms(session)


def by_profiler(
    path: Path, image: Tensor, seconds: float, threads: int
) -> tuple[list[float], Estimate]:
    """Return ONNX Runtime's own times in ms of a session's calls, and how much slower that made it.

    The latter is the ratio of that session's calls to those of one like it that nobody looks into,
    both by our clock and in turns.
    """
    sessions = [
        session_for(path, threads=threads, profile_to=to) for to in (None, path.with_suffix(""))
    ]
    feed = {sessions[0].get_inputs()[0].name: image.numpy()}
    calls = [functools.partial(session.run, None, feed) for session in sessions]
    found = timing.race([timing.Runner(call, lambda: None) for call in calls], seconds)
    return _profiled_ms(sessions[1]), ratio_of(found, 1)


def _profiled_ms(session: Any) -> list[float]:
    """Return what a session's profiler tells of its calls in ms, without the first two."""
    events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    return [event["dur"] / 1e3 for event in events if event.get("name") == "model_run"][2:]


def by_test_tool(path: Path, image: Tensor, seconds: float) -> list[float]:
    """Return mean times in ms by ONNX Runtime's own test tool, which uses every core."""
    from onnxruntime.tools import onnxruntime_test

    feed = {session_for(path, threads=1).get_inputs()[0].name: image.numpy()}
    found: list[float] = []
    until, calls = time.perf_counter() + seconds, 10
    while len(found) < 1 + FEWEST or time.perf_counter() < until:
        told = io.StringIO()
        with contextlib.redirect_stdout(told):
            onnxruntime_test.run_model(str(path), calls, feeds=feed, override_initializers=False)
        found.append(float(re.findall(r"avg latency: (\S+) ms", told.getvalue())[0]))
        calls = max(10, round(seconds / TOOL_RUNS * 1e3 / found[-1]))
    return found[1:]

"""Is the bench itself right? Its intervals, planted differences, and other instruments' medians.

    python tests/benchmarks/instrument.py                 # on a quiet machine, some twenty minutes
    python tests/benchmarks/instrument.py --load          # with a second process on one core
    python tests/benchmarks/instrument.py --runs 3 --short 0.2 --long 0.5      # does it run at all

Each line says what was to be shown, what came out and whether it passed; the exit code is 1 if
one did not. A 95 % interval misses once in twenty times by its nature: that is counted, not hoped.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from other_clocks import by_onnxruntime, by_profiler, by_test_tool, by_torch
from torch import Tensor, nn

import attnsurgeon
from attnsurgeon.bench import Comparison, Timing
from attnsurgeon.bench.inputs import make_inputs
from attnsurgeon.bench.interval import NOISE, Estimate
from attnsurgeon.card import card_of
from attnsurgeon.host import load_host

LEAST_HOLDING = 0.95
NARROW = 0.01
"""Half-width of the interval of a file against itself, after the long run."""
LOADED = 0.02
"""Of the ratio of a file against itself, while another process loads a core."""
PLANTED, UNSEEN = 0.03, 0.003
REPEATED = 21, 20
"""Beside a loaded core: +5 %, beyond what LOADED would let a ratio of 1 pass for."""
SAME_CALLS = 0.02
"""Of the median of calls that two clocks have both seen."""
TURNS = 5
AGREEMENT = 0.03
"""Of medians, beyond what both instruments' own intervals allow: they run at other moments."""


@dataclass(frozen=True)
class Finding:
    """One thing that was to be shown."""

    what: str
    found: str
    passed: bool

    def __str__(self) -> str:
        """Return one row of the table."""
        return f"{'passed' if self.passed else 'FAILED'}  {self.what}: {self.found}"


class Delayed(nn.Module):
    """A network that afterwards keeps the core busy for a share of its own time.

    The loop is calibrated by each call itself, so that load and clocks move both alike.
    """

    def __init__(self, net: nn.Module, share: float) -> None:
        super().__init__()
        self.net, self.share = net, share

    def forward(self, x: Tensor) -> Tensor:
        """Return what the network returns, later."""
        start = time.perf_counter_ns()
        output: Tensor = self.net(x)
        now = time.perf_counter_ns()
        until = now + self.share * (now - start)
        while time.perf_counter_ns() < until:
            pass
        return output


class Repeated(nn.Module):
    """A network that runs several times on a small image: work of a known ratio on any machine."""

    def __init__(self, net: nn.Module, times: int) -> None:
        super().__init__()
        self.net, self.times = net, times

    def forward(self, x: Tensor) -> Tensor:
        """Return what the network returns for every fourth pixel."""
        output: Tensor = self.net(x[..., ::4, ::4])
        for _ in range(self.times - 1):
            output = self.net(x[..., ::4, ::4])
        return output


def _spin() -> None:
    while True:
        pass


@contextmanager
def loaded() -> Iterator[None]:
    """Load one core from another process."""
    process = multiprocessing.get_context("spawn").Process(target=_spin, daemon=True)
    process.start()
    try:
        yield
    finally:
        process.terminate()
        process.join()


def write_file(name: str, folder: Path) -> Path:
    """Return a file of the network with SE in every block, random weights."""
    host = load_host(name, weights="none")
    card = card_of(host)
    operated = attnsurgeon.insert_attention(host, "se", example=card.example() if card else None)
    path = folder / f"{name}_se.safetensors"
    attnsurgeon.save_model(operated, path)
    return path


def compare(sides: Sequence[Path | nn.Module], seconds: float, engine: str, **extra: Any) -> Any:
    """Return the one comparison of two sides, on the CPU."""
    report = attnsurgeon.bench.compare_speed(
        sides, engines=[engine], device="cpu", seconds=seconds, **extra
    )
    return report.comparisons[0]


def judge_holding(found: Sequence[Comparison]) -> Finding:
    """Judge how many intervals of a file against itself hold 1.00."""
    held = sum(c.interval95[0] <= 1 <= c.interval95[1] for c in found)
    return Finding(
        "a file against itself holds 1.00",
        f"{held} of {len(found)} short runs",
        held >= LEAST_HOLDING * len(found),
    )


def judge_width(found: Comparison, seconds: float) -> Finding:
    """Judge how narrow the interval of a file against itself is."""
    half = (found.interval95[1] - found.interval95[0]) / 2
    what = f"narrower than +-{100 * NARROW:g} % in {seconds:g} s"
    return Finding(what, f"+-{100 * half:.2f} %", half < NARROW)


def judge_planted(found: Comparison, share: float) -> Finding:
    """Judge a planted slowdown: found with its size in the interval, or not seen if tiny."""
    low, high = found.interval95
    if share == UNSEEN:
        passed = found.verdict == NOISE
    else:
        passed = found.verdict != NOISE and low <= 1 + share <= high
    return Finding(f"a planted +{100 * share:g} %", found.verdict, passed)


def judge_loaded(found: Comparison, truth: float = 1.0) -> Finding:
    """Judge a ratio that is known while another process loads a core."""
    return Finding(
        f"within +-{100 * LOADED:g} % of {truth:g} with a core loaded",
        f"{found.ratio:.4f}",
        abs(found.ratio - truth) <= LOADED,
    )


def judge_median(ours: Timing, other_ms: float, spread: float, name: str) -> Finding:
    """Judge another instrument's median by our interval, widened by its own relative spread."""
    low, high = ours.median95_ms or (ours.median_ms, ours.median_ms)
    air = AGREEMENT + spread
    return Finding(
        f"the median agrees with {name}",
        f"{ours.median_ms:.4g} ms [{low:.4g}, {high:.4g}] against {other_ms:.4g} ms",
        low * (1 - air) <= other_ms <= high * (1 + air),
    )


def judge_profiler(ours: Timing, profiled_ms: Sequence[float], cost: Estimate) -> Finding:
    """Judge our median by that of ONNX Runtime's profiler, less what looking costs."""
    middle, spread = _middle(profiled_ms)
    unsure = (cost.high - cost.low) / cost.ratio / 2
    told = f"{middle:.4g} ms, calls that it slows by {100 * (cost.ratio - 1):.1f} %"
    name = f"onnxruntime's profiler ({told})"
    return judge_median(ours, middle / cost.ratio, spread + unsure, name)


def judge_clock(ours_ms: float, other_ms: float) -> Finding:
    """Judge what our clock and ONNX Runtime's own say of the very same calls."""
    return Finding(
        "the clock agrees with onnxruntime's own on the same calls",
        f"{ours_ms:.4g} ms against {other_ms:.4g} ms",
        abs(ours_ms / other_ms - 1) <= SAME_CALLS,
    )


def findings(options: argparse.Namespace, folder: Path) -> Iterator[Finding]:
    """Yield everything that is to be shown."""
    path = write_file(options.model, folder)
    engine = options.engine
    host = load_host(options.model, weights="none")
    card = card_of(host)
    assert card is not None
    example = card.example()
    if options.load:
        with loaded():
            yield judge_loaded(compare([path, path], options.long, engine))
            fewer, more = (Repeated(host, times) for times in sorted(REPEATED))
            found = compare([fewer, more], options.long, "eager", example=example)
            yield judge_loaded(found, more.times / fewer.times)
        return
    yield judge_holding([compare([path, path], options.short, engine) for _ in range(options.runs)])
    yield judge_width(compare([path, path], options.long, engine), options.long)
    for share in (PLANTED, UNSEEN):
        sides = [Delayed(host, 0.0), Delayed(host, share)]
        yield judge_planted(compare(sides, options.planted, "eager", example=example), share)
    yield from _agreements(options, path, make_inputs(example, 1, torch.device("cpu"))[0])


def _agreements(options: argparse.Namespace, path: Path, image: Tensor) -> Iterator[Finding]:
    """Run each pair of instruments in turns and judge the middle one: machines drift meanwhile."""
    threads, seconds = torch.get_num_threads(), options.long / 3
    turns = []
    for _ in range(TURNS):
        report = attnsurgeon.bench.compare_speed(
            [path, path], engines=["eager"], device="cpu", seconds=options.long
        )
        turns.append((report.runs[0], *by_torch(path, image, seconds, threads)))
    turns.sort(key=lambda turn: turn[0].median_ms / turn[1])
    yield judge_median(*turns[TURNS // 2], "torch.utils.benchmark")
    onnx = path.with_suffix(".onnx")
    attnsurgeon.export_model(attnsurgeon.load_model(path), onnx)
    tools, profiles, profiles_of_one, raced = [], [], [], []
    for _ in range(TURNS):
        # One right before ours and the next right after it: the machine drifts within a minute.
        tool = _middle(by_test_tool(onnx, image, seconds))
        many = _of_onnx(onnx, options.long, threads)
        ours, theirs = by_onnxruntime(onnx, image, seconds, threads)
        yield judge_clock(statistics.median(ours), statistics.median(theirs))
        tools.append((many, *tool))
        profiles.append((many, *_middle(theirs)))
        raced.append((many, *by_profiler(onnx, image, seconds, threads)))
        one = _of_onnx(onnx, options.long, 1)
        profiles_of_one.append((one, *_middle(by_onnxruntime(onnx, image, seconds, 1)[1])))
    for turns, name in (
        (tools, "onnxruntime's test tool"),
        (profiles_of_one, "onnxruntime's profiler, one thread"),
        (profiles, "onnxruntime's own"),
    ):
        turns.sort(key=lambda turn: turn[0].median_ms / turn[1])
        yield judge_median(*turns[TURNS // 2], name)
    raced.sort(key=lambda turn: turn[0].median_ms / statistics.median(turn[1]) * turn[2].ratio)
    yield judge_profiler(*raced[TURNS // 2])


def _of_onnx(path: Path, seconds: float, threads: int) -> Timing:
    """Return what the bench says of an ONNX file that runs against itself."""
    report = attnsurgeon.bench.compare_speed(
        [path, path], engines=["onnxruntime"], device="cpu", seconds=seconds, threads=threads
    )
    return report.runs[0]


def _middle(times: Sequence[float]) -> tuple[float, float]:
    """Return the median and the relative spread around it."""
    low, middle, high = statistics.quantiles(times, n=4)
    return middle, (high - low) / middle / 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Print a line for each finding; return 1 if one failed."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--engine", default="eager", help="of a file against itself")
    parser.add_argument("--runs", type=int, default=100, help="short runs")
    parser.add_argument("--short", type=float, default=3.0, help="seconds of a short run")
    parser.add_argument("--long", type=float, default=30.0, help="seconds of a long run")
    parser.add_argument("--planted", type=float, default=10.0, help="seconds of a planted one")
    parser.add_argument("--load", action="store_true", help="load one core meanwhile")
    options = parser.parse_args(arguments)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for finding in findings(options, Path(folder)):
            print(finding, flush=True)
            failed += not finding.passed
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())

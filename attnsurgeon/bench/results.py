"""What a comparison found: the times of each run, the ratios, and where it ran.

The keys of all JSON here, with their meaning, stand in schema.py.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from attnsurgeon.bench.findings import Failure, Profile, SiteCosts
from attnsurgeon.bench.schema import VERSION

PERCENTILES = (5, 50, 90, 95, 99)


@dataclass(frozen=True)
class Timing:
    """The times of one target on one engine at one batch size.

    Attributes:
        target: as the user typed it.
        engine: what ran it.
        device: cpu, or cuda:N.
        batch: number of images per call.
        samples_ms: every timed call, in the order of running.
        parameters: gates included; of an .onnx or a frozen file all that it holds; None of a
            compiled .pt2 file.
        macs: multiply-adds for one image; None for a compiled .pt2 file.
        file_bytes: size of the target's file; None where there is none.
        provider: of ONNX Runtime, as the session reports it; None for other engines.
        weights: `random`, `file`, or `given` with the module.
        precision: fp32, tf32, bf16, fp16; of each target its own where none was asked for.
        channels_last: whether maps lie in memory with the channels last.
        train: whether a call is a whole step of training.
        median95_ms: 95 % interval of the median, from its spread between rounds.
        load_s: reading the target and making it ready for the engine.
        first_run_ms: the first call, compiling included.
        peak_host_bytes: host memory at the highest during a call, weights included.
        peak_device_bytes: the same on a CUDA device.
        uncounted: operators that compute something besides the multiply-adds.
        bandwidth_share: bytes that all operators would move one by one in the median time, over
            what the machine can copy in it; above 1 where fusion or caches save traffic.
        arithmetic_share: multiply-adds in the median time over those of a matrix product.
        doubts: reasons not to trust these times.
    """

    target: str
    engine: str
    device: str
    batch: int
    samples_ms: tuple[float, ...]
    parameters: int | None = None
    macs: int | None = None
    file_bytes: int | None = None
    provider: str | None = None
    weights: str = "file"
    precision: str = "fp32"
    channels_last: bool = False
    train: bool = False
    median95_ms: tuple[float, float] | None = None
    load_s: float | None = None
    first_run_ms: float | None = None
    peak_host_bytes: int | None = None
    peak_device_bytes: int | None = None
    uncounted: tuple[str, ...] = ()
    bandwidth_share: float | None = None
    arithmetic_share: float | None = None
    doubts: tuple[str, ...] = ()

    @property
    def median_ms(self) -> float:
        """The middle of all timed calls."""
        return statistics.median(self.samples_ms)

    @property
    def p5_ms(self) -> float:
        """The time that 5 % of the calls stay under."""
        return self.percentile_ms(5)

    @property
    def p95_ms(self) -> float:
        """The time that 95 % of the calls stay under."""
        return self.percentile_ms(95)

    def percentile_ms(self, percent: float) -> float:
        """Return the time that this many of a hundred calls stay under."""
        return float(np.percentile(self.samples_ms, percent))

    @property
    def images_per_s(self) -> float:
        """Throughput at the median."""
        return 1e3 * self.batch / self.median_ms

    @property
    def variation(self) -> float:
        """Coefficient of variation of the calls: standard deviation over mean."""
        return float(np.std(self.samples_ms) / np.mean(self.samples_ms))

    def to_json(self) -> dict[str, Any]:
        """Return plain values; times to a tenth of a microsecond."""
        bounds = self.median95_ms
        return {
            "target": self.target,
            "engine": self.engine,
            "device": self.device,
            "batch": self.batch,
            "median_ms": round(self.median_ms, 4),
            **{f"p{percent}_ms": round(self.percentile_ms(percent), 4) for percent in PERCENTILES},
            "samples_ms": [round(sample, 4) for sample in self.samples_ms],
            "parameters": self.parameters,
            "macs": self.macs,
            "file_bytes": self.file_bytes,
            "provider": self.provider,
            "weights": self.weights,
            "precision": self.precision,
            "channels_last": self.channels_last,
            "train": self.train,
            "median95_ms": [round(bound, 4) for bound in bounds] if bounds else None,
            "images_per_s": round(self.images_per_s, 4),
            "variation": round(self.variation, 4),
            "load_s": _rounded(self.load_s, 4),
            "first_run_ms": _rounded(self.first_run_ms, 4),
            "peak_host_bytes": self.peak_host_bytes,
            "peak_device_bytes": self.peak_device_bytes,
            "uncounted": list(self.uncounted),
            "bandwidth_share": _rounded(self.bandwidth_share, 4),
            "arithmetic_share": _rounded(self.arithmetic_share, 4),
            "doubts": list(self.doubts),
        }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def _rounded_ratio(value: float) -> float:
    """Return a ratio that is rounded, but never to 0."""
    return round(value, 4) if value >= 0.1 else float(f"{value:.4g}")


@dataclass(frozen=True)
class Comparison:
    """One target against the baseline, on one engine at one batch size.

    Attributes:
        target: as the user typed it.
        baseline: name of the other.
        engine: what ran both.
        device: cpu, or cuda:N.
        batch: number of images per call.
        ratio: time over the baseline's, above 1 is slower; of the faster half of the blocks of
            each, or, where most were held up, as the doubts say.
        interval95: 95 % interval of the ratio.
        verdict: "+6.2 % [5.1, 7.4]" or "not distinguishable from noise".
        precision: as of the target's run.
        channels_last: as of the target's run.
        train: as of the target's run.
        doubts: reasons not to trust the ratio.
    """

    target: str
    baseline: str
    engine: str
    device: str
    batch: int
    ratio: float
    interval95: tuple[float, float]
    verdict: str
    precision: str = "fp32"
    channels_last: bool = False
    train: bool = False
    doubts: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ratios to a hundredth of a percent, small ones to four digits."""
        return {
            "target": self.target,
            "baseline": self.baseline,
            "engine": self.engine,
            "device": self.device,
            "batch": self.batch,
            "ratio": _rounded_ratio(self.ratio),
            "interval95": [_rounded_ratio(bound) for bound in self.interval95],
            "verdict": self.verdict,
            "precision": self.precision,
            "channels_last": self.channels_last,
            "train": self.train,
            "doubts": list(self.doubts),
        }


@dataclass(frozen=True)
class Report:
    """All runs and comparisons of one call of compare_speed.

    Attributes:
        environment: machine, versions, threads, device, notes, as plain values.
        runs: one for each engine, batch and target, in this order.
        comparisons: of every target but the baseline, in the same order.
        failures: what did not fit into memory.
        sites: what each site costs, where that was asked for.
        profiles: per-operator tables, where they were asked for.
        is_interrupted: whether the rest is missing.
    """

    environment: Mapping[str, Any]
    runs: tuple[Timing, ...]
    comparisons: tuple[Comparison, ...]
    failures: tuple[Failure, ...] = ()
    sites: tuple[SiteCosts, ...] = ()
    profiles: tuple[Profile, ...] = ()
    is_interrupted: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for json.dumps."""
        return {
            "schema": VERSION,
            "environment": dict(self.environment),
            "runs": [run.to_json() for run in self.runs],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
            "failures": [failure.to_json() for failure in self.failures],
            "sites": [costs.to_json() for costs in self.sites],
            "profiles": [profile.to_json() for profile in self.profiles],
            "interrupted": self.is_interrupted,
        }

"""What a comparison found: the times of each run, the ratios, and where it ran."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Timing:
    """The times of one target on one engine at one batch size.

    Attributes:
        target: as the user typed it.
        engine: what ran it.
        device: cpu, or cuda:N.
        batch: number of images per call.
        samples_ms: every timed call, in the order of running.
        parameters: gates included; None for an .onnx file.
        macs: multiply-adds for one image; None for an .onnx file.
        file_bytes: size of the target's file; None where there is none.
        provider: of ONNX Runtime, as the session reports it; None for other engines.
        weights: `random`, `file`, or `given` with the module.
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

    @property
    def median_ms(self) -> float:
        """The middle of all timed calls."""
        return statistics.median(self.samples_ms)

    @property
    def p5_ms(self) -> float:
        """The time that 5 % of the calls stay under."""
        return float(np.percentile(self.samples_ms, 5))

    @property
    def p95_ms(self) -> float:
        """The time that 95 % of the calls stay under."""
        return float(np.percentile(self.samples_ms, 95))

    def to_json(self) -> dict[str, Any]:
        """Return plain values; times to a tenth of a microsecond."""
        return {
            "target": self.target,
            "engine": self.engine,
            "device": self.device,
            "batch": self.batch,
            "median_ms": round(self.median_ms, 4),
            "p5_ms": round(self.p5_ms, 4),
            "p95_ms": round(self.p95_ms, 4),
            "samples_ms": [round(sample, 4) for sample in self.samples_ms],
            "parameters": self.parameters,
            "macs": self.macs,
            "file_bytes": self.file_bytes,
            "provider": self.provider,
            "weights": self.weights,
        }


@dataclass(frozen=True)
class Comparison:
    """One target against the baseline, pair by pair, on one engine at one batch size.

    Attributes:
        target: as the user typed it.
        baseline: name of the other.
        engine: what ran both.
        device: cpu, or cuda:N.
        batch: number of images per call.
        ratio: time over the baseline's; above 1 is slower.
        interval95: bootstrap 95 % interval of the ratio.
        verdict: "+6.2 % [5.1, 7.4]" or "not distinguishable from noise".
    """

    target: str
    baseline: str
    engine: str
    device: str
    batch: int
    ratio: float
    interval95: tuple[float, float]
    verdict: str

    def to_json(self) -> dict[str, Any]:
        """Return plain values; ratios to a hundredth of a percent."""
        return {
            "target": self.target,
            "baseline": self.baseline,
            "engine": self.engine,
            "device": self.device,
            "batch": self.batch,
            "ratio": round(self.ratio, 4),
            "interval95": [round(bound, 4) for bound in self.interval95],
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Report:
    """All runs and comparisons of one call of compare_speed.

    Attributes:
        environment: machine, versions, threads, device, notes, as plain values.
        runs: one for each engine, batch and target, in this order.
        comparisons: of every target but the baseline, in the same order.
    """

    environment: Mapping[str, Any]
    runs: tuple[Timing, ...]
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """Return plain values, ready for json.dumps."""
        return {
            "environment": dict(self.environment),
            "runs": [run.to_json() for run in self.runs],
            "comparisons": [comparison.to_json() for comparison in self.comparisons],
        }

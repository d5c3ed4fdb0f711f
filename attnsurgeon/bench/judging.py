"""What a race says of each target: its figures, its ratio, and the doubts of both."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

from attnsurgeon.bench.ceilings import Ceilings
from attnsurgeon.bench.cost import Cost
from attnsurgeon.bench.doubts import drift_doubt, launch_doubt, spread_doubt, transfer_doubt
from attnsurgeon.bench.findings import Job
from attnsurgeon.bench.interval import student_quantile, verdict
from attnsurgeon.bench.lineup import Lineup
from attnsurgeon.bench.precision import DTYPES, precision_of
from attnsurgeon.bench.ratios import ratio_of
from attnsurgeon.bench.ready import Ready
from attnsurgeon.bench.results import Comparison, Timing
from attnsurgeon.bench.rounds import Race
from attnsurgeon.bench.targets import Target


def judge_time(
    lineup: Lineup,
    i: int,
    job: Job,
    precision: str | None,
    ready: Ready,
    found: Race,
    doubts: Sequence[str | None],
) -> Timing:
    """Return the figures of one target.

    Args:
        lineup: all targets.
        i: number of the target.
        job: what ran it.
        precision: that was asked for; None is the target's own.
        ready: how it was made ready.
        found: the race that it took part in.
        doubts: reasons not to trust them.
    """
    target, cost = lineup.targets[i], lineup.costs[i]
    own = precision or precision_of(target)
    samples = found.samples_ms[i]
    shares: tuple[float | None, float | None] = (None, None)
    if not job.train:
        shares = _shares(cost, target, own, job.batch, samples, lineup.ceilings(own))
    return Timing(
        target=target.name,
        engine=job.engine,
        device=job.device,
        batch=job.batch,
        samples_ms=samples,
        parameters=cost.parameters,
        macs=cost.macs,
        file_bytes=cost.file_bytes,
        provider=ready.runner.provider,
        weights=target.weights,
        precision=own,
        channels_last=job.channels_last,
        train=job.train,
        median95_ms=median_interval(found.log_times(i), statistics.median(samples)),
        load_s=ready.load_s,
        first_run_ms=ready.first_run_ms,
        peak_host_bytes=ready.peak_host_bytes,
        peak_device_bytes=ready.peak_device_bytes,
        uncounted=cost.uncounted,
        bandwidth_share=shares[0],
        arithmetic_share=shares[1],
        doubts=tuple(doubt for doubt in doubts if doubt),
    )


def median_interval(log_times: Sequence[float], median: float) -> tuple[float, float] | None:
    """Return the 95 % interval of a median, from the medians of two rounds or more."""
    count = len(log_times)
    if count < 2:
        return None
    half = student_quantile(count - 1) * statistics.stdev(log_times) / math.sqrt(count)
    return median * math.exp(-half), median * math.exp(half)


def _shares(
    cost: Cost,
    target: Target,
    precision: str,
    batch: int,
    samples_ms: Sequence[float],
    ceilings: Ceilings,
) -> tuple[float | None, float | None]:
    """Return the shares of the memory's and the arithmetic's ceilings that a run reaches."""
    if cost.macs is None or cost.weight_bytes is None or cost.map_bytes is None:
        return None, None
    seconds = statistics.median(samples_ms) / 1e3
    narrowed = DTYPES[precision].itemsize / DTYPES[precision_of(target)].itemsize
    moved = narrowed * (cost.weight_bytes + batch * cost.map_bytes)
    return (
        moved / seconds / ceilings.bytes_per_s,
        batch * cost.macs / seconds / ceilings.macs_per_s,
    )


def doubts_of(found: Race, i: int, sent_ms: float | None) -> list[str | None]:
    """Return the reasons not to trust the times of one target, as far as the race tells."""
    samples = found.samples_ms[i]
    return [
        spread_doubt(samples),
        drift_doubt(found.log_times(i)),
        launch_doubt(found.enqueued[i] if found.enqueued else None),
        transfer_doubt(sent_ms, statistics.median(samples)),
    ]


def compare(
    timings: Sequence[Timing], found: Race, doubts: Sequence[str | None]
) -> list[Comparison]:
    """Judge every timing but the first against the first."""
    baseline = timings[0]
    comparisons = []
    for i, timing in enumerate(timings[1:], start=1):
        ratio = ratio_of(found, i)
        folded = [doubt for doubt in timing.doubts if doubt.startswith("folded")]
        comparisons.append(
            Comparison(
                target=timing.target,
                baseline=baseline.target,
                engine=timing.engine,
                device=timing.device,
                batch=timing.batch,
                ratio=ratio.ratio,
                interval95=(ratio.low, ratio.high),
                verdict=verdict(ratio),
                precision=timing.precision,
                channels_last=timing.channels_last,
                train=timing.train,
                doubts=(*folded, *(doubt for doubt in doubts if doubt)),
            )
        )
    return comparisons

"""Run one job: make all targets ready, time them in turns, and judge what came out."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from attnsurgeon.bench import engines as known_engines
from attnsurgeon.bench.ceilings import Ceilings, measure_ceilings
from attnsurgeon.bench.cost import Cost
from attnsurgeon.bench.doubts import (
    drift_doubt,
    launch_doubt,
    machine_doubts,
    spread_doubt,
    stability_doubt,
    transfer_doubt,
)
from attnsurgeon.bench.engines import Place
from attnsurgeon.bench.findings import Job, Profile, SiteCosts
from attnsurgeon.bench.inputs import cast_inputs, lay_out, make_inputs, send_inputs
from attnsurgeon.bench.interval import student_quantile, verdict
from attnsurgeon.bench.largest import find_largest
from attnsurgeon.bench.per_site import cost_sites
from attnsurgeon.bench.precision import DTYPES, fit_target, precision_of
from attnsurgeon.bench.ratios import ratio_of
from attnsurgeon.bench.ready import Ready, gates_doubt, make_ready
from attnsurgeon.bench.request import Request
from attnsurgeon.bench.results import Comparison, Timing
from attnsurgeon.bench.rounds import Race, RaceInterrupted
from attnsurgeon.bench.targets import Inputs, Target
from attnsurgeon.bench.timing import Runner, race
from attnsurgeon.bench.watch import Watch

Tell = Callable[[str, float], None]
RACE_SHARE = 0.3
"""Of a job, where each site is timed as well."""


@dataclass(frozen=True)
class Field:
    """The targets as they start: comparable, with what each costs, and an input for one image."""

    targets: tuple[Target, ...]
    costs: tuple[Cost, ...]
    example: Inputs
    request: Request
    _fitted: dict[str | None, tuple[Target, ...]] = field(default_factory=dict)
    _ceilings: dict[str, Ceilings] = field(default_factory=dict)

    def fitted(self, precision: str | None) -> tuple[Target, ...]:
        """Return the targets in a precision, each time the same ones; others are let go."""
        if precision not in self._fitted:
            wanted = {"channels_last": self.request.channels_last, "train": self.request.train}
            self._fitted.clear()
            self._fitted[precision] = tuple(
                fit_target(target, precision, **wanted) for target in self.targets
            )
        return self._fitted[precision]

    def ceilings(self, precision: str) -> Ceilings:
        """Return what the device can do, measured once for each precision."""
        if precision not in self._ceilings:
            self._ceilings[precision] = measure_ceilings(self.request.device, precision)
        return self._ceilings[precision]

    @property
    def known_ceilings(self) -> list[Ceilings]:
        """All that were measured."""
        return list(self._ceilings.values())


@dataclass
class Outcome:
    """What one job found; after an interrupt, as far as it came."""

    timings: list[Timing] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    sites: list[SiteCosts] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)


class JobInterrupted(KeyboardInterrupt):
    """An interrupt after something had been measured: `outcome` holds it."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__()
        self.outcome = outcome


def largest_batch(
    lineup: Field, engine: str, precision: str | None, place: Place, tell: Tell
) -> tuple[int, int]:
    """Return the largest batch at which all targets are ready together, and what did not fit."""

    def attempt(batch: int) -> None:
        _line_up(lineup, engine, precision, batch, place, lambda text, share: None)

    return find_largest(attempt, lambda batch: tell(f"trying batch {batch}", 0.0))


def run_job(lineup: Field, job: Job, precision: str | None, place: Place, tell: Tell) -> Outcome:
    """Time all targets in one job.

    Raises:
        JobInterrupted: an interrupt came after something had been found.
    """
    request, outcome = lineup.request, Outcome()
    inputs, ready, sent_ms = _line_up(lineup, job.engine, precision, job.batch, place, tell)
    if not request.train:
        # Before the race: what a ceiling leaves in caches and clocks is no target's business.
        for own in {precision or precision_of(target) for target in lineup.targets}:
            lineup.ceilings(own)
    watch = Watch(place.device)
    is_interrupted = False
    try:
        found = race(
            [one.runner for one in ready],
            request.seconds,
            functools.partial(_tell_race, tell, RACE_SHARE if request.per_site else 1.0),
        )
    except RaceInterrupted as stop:
        found, is_interrupted = stop.race, True
    noticed = machine_doubts(watch.look())
    for i, target in enumerate(lineup.targets):
        doubts = _doubts_of(found, i, sent_ms, noticed)
        if not request.train:
            doubts += [gates_doubt(target, inputs, ready[i].output)]
        timing = _timing(lineup, i, job, precision, ready[i], found)
        outcome.timings.append(_with_doubts(timing, doubts))
    outcome.comparisons += _compare(outcome.timings, found, request.seconds, noticed)
    if is_interrupted:
        raise JobInterrupted(outcome)
    if request.profile:
        outcome.profiles += _profiles(job, lineup.targets, ready)
    if request.per_site:
        outcome.sites += _sites(lineup, job, precision, inputs, place, tell)
    return outcome


def _line_up(
    lineup: Field, engine: str, precision: str | None, batch: int, place: Place, tell: Tell
) -> tuple[Inputs, list[Ready], float | None]:
    """Return the batch on the CPU, all targets ready, and the ms of sending it to the device."""
    inputs = make_inputs(lineup.example, batch, torch.device("cpu"))
    ready, sent_ms = [], None
    for target in lineup.fitted(precision):
        tell(f"preparing {target.name}", 0.0)
        one, sent_ms = _ready(lineup, engine, target, inputs, place)
        ready.append(one)
    return inputs, ready, sent_ms


def _ready(
    lineup: Field, engine: str, target: Target, inputs: Inputs, place: Place
) -> tuple[Ready, float | None]:
    own = lay_out(cast_inputs(inputs, target), channels_last=lineup.request.channels_last)
    sent, sent_ms = send_inputs(own, place.device)
    return make_ready(known_engines.get(engine), engine, target, sent, place), sent_ms


def _tell_race(tell: Tell, whole: float, share: float, found: Race) -> None:
    so_far = ""
    if len(found.rounds) > 1 and len(found.samples_ms) > 1:
        ratios = [ratio_of(found, i) for i in range(1, len(found.samples_ms))]
        so_far = f": {', '.join(verdict(ratio) for ratio in ratios)}"
    tell(f"measuring{so_far}", whole * share)


def _timing(
    lineup: Field, i: int, job: Job, precision: str | None, ready: Ready, found: Race
) -> Timing:
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


def _doubts_of(
    found: Race, i: int, sent_ms: float | None, noticed: Sequence[str]
) -> list[str | None]:
    samples = found.samples_ms[i]
    return [
        spread_doubt(samples),
        drift_doubt(found.log_times(i)),
        launch_doubt(found.enqueued[i] if found.enqueued else None),
        transfer_doubt(sent_ms, statistics.median(samples)),
        *noticed,
    ]


def _with_doubts(timing: Timing, doubts: Sequence[str | None]) -> Timing:
    held: dict[str, Any] = dict(timing.__dict__)
    return Timing(**{**held, "doubts": tuple(doubt for doubt in doubts if doubt)})


def _compare(
    timings: Sequence[Timing], found: Race, seconds: float, noticed: Sequence[str]
) -> list[Comparison]:
    """Judge every timing but the first against the first, pair by pair."""
    baseline = timings[0]
    unstable = stability_doubt(found, seconds)
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
                doubts=(*([unstable] if unstable else []), *folded, *noticed),
            )
        )
    return comparisons


def _profiles(job: Job, targets: Sequence[Target], ready: Sequence[Ready]) -> list[Profile]:
    return [
        Profile(job, target.name, tuple(one.runner.profile()))
        for target, one in zip(targets, ready, strict=True)
        if one.runner.profile is not None
    ]


def _sites(
    lineup: Field, job: Job, precision: str | None, inputs: Inputs, place: Place, tell: Tell
) -> list[SiteCosts]:
    def prepare(target: Target) -> Runner:
        return _ready(lineup, job.engine, target, inputs, place)[0].runner

    def told(text: str, share: float) -> None:
        tell(text, RACE_SHARE + (1 - RACE_SHARE) * share)

    seconds = lineup.request.seconds
    costs = [
        cost_sites(target, job, cast_inputs(inputs, target), prepare, seconds, told)
        for target in lineup.fitted(precision)
    ]
    return [cost for cost in costs if cost is not None]

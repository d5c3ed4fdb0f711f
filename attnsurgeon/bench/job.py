"""Run one job: make all targets ready, time them in turns, and judge what came out."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field

from attnsurgeon.bench.doubts import finite_doubt, machine_doubts, stability_doubt
from attnsurgeon.bench.engines import Place
from attnsurgeon.bench.findings import Job, Profile, SiteCosts
from attnsurgeon.bench.inputs import cast_inputs
from attnsurgeon.bench.interval import verdict
from attnsurgeon.bench.judging import compare, doubts_of, judge_time
from attnsurgeon.bench.lineup import Lineup, Tell
from attnsurgeon.bench.per_site import cost_sites
from attnsurgeon.bench.precision import precision_of
from attnsurgeon.bench.ratios import ratio_of
from attnsurgeon.bench.ready import gates_doubt
from attnsurgeon.bench.results import Comparison, Timing
from attnsurgeon.bench.rounds import Race, RaceInterrupted
from attnsurgeon.bench.targets import Inputs, Target
from attnsurgeon.bench.timing import Runner, race
from attnsurgeon.bench.watch import Watch

RACE_SHARE = 0.3
"""Of a job, where each site is timed as well."""


@dataclass
class Outcome:
    """What jobs found; after an interrupt, as far as they came."""

    timings: list[Timing] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    sites: list[SiteCosts] = field(default_factory=list)
    profiles: list[Profile] = field(default_factory=list)


def run_job(
    lineup: Lineup, job: Job, precision: str | None, place: Place, tell: Tell, outcome: Outcome
) -> None:
    """Time all targets in one job, and enter in the outcome what is found as soon as it is found.

    Raises:
        KeyboardInterrupt: an interrupt; what was found before it is in the outcome.
    """
    request = lineup.request
    inputs, ready, sent_ms = lineup.make_ready(job.engine, precision, job.batch, place, tell)
    if not request.train:
        # Before the race: what a ceiling leaves in caches and clocks is no target's business.
        for own in {precision or precision_of(target) for target in lineup.targets}:
            lineup.ceilings(own)
    watch = Watch(place.device)
    stop: KeyboardInterrupt | None = None
    try:
        found = race(
            [one.runner for one in ready],
            request.seconds,
            functools.partial(_tell_race, tell, RACE_SHARE if request.per_site else 1.0),
        )
    except RaceInterrupted as interrupt:
        found, stop = interrupt.race, interrupt
    noticed = machine_doubts(watch.look())
    unstable = stability_doubt(found, request.seconds)
    timings = []
    for i, target in enumerate(lineup.targets):
        doubts = [*doubts_of(found, i, sent_ms), *noticed, finite_doubt(ready[i].output)]
        if len(ready) == 1:
            doubts.append(unstable)  # of several, it is their ratios that have to settle
        if not request.train:
            try:
                doubts.append(gates_doubt(target, inputs, ready[i].output))
            except KeyboardInterrupt as interrupt:  # what was timed before it is kept
                stop = interrupt
        timings.append(judge_time(lineup, i, job, precision, ready[i], found, doubts))
    outcome.timings += timings
    outcome.comparisons += compare(timings, found, [unstable, *noticed])
    if stop is not None:
        raise stop
    if request.profile:
        for target, one in zip(lineup.targets, ready, strict=True):
            if one.runner.profile is not None:
                outcome.profiles.append(Profile(job, target.name, tuple(one.runner.profile())))
    if request.per_site:
        _run_sites(lineup, job, precision, inputs, place, tell, outcome)


def _tell_race(tell: Tell, whole: float, share: float, found: Race) -> None:
    so_far = ""
    if len(found.rounds) > 1 and len(found.samples_ms) > 1:
        ratios = [ratio_of(found, i) for i in range(1, len(found.samples_ms))]
        so_far = f": {', '.join(verdict(ratio) for ratio in ratios)}"
    tell(f"measuring{so_far}", whole * share)


def _run_sites(
    lineup: Lineup,
    job: Job,
    precision: str | None,
    inputs: Inputs,
    place: Place,
    tell: Tell,
    outcome: Outcome,
) -> None:
    def prepare(target: Target) -> Runner:
        return lineup.make_one_ready(job.engine, target, inputs, place)[0].runner

    def told(text: str, share: float) -> None:
        tell(text, RACE_SHARE + (1 - RACE_SHARE) * share)

    for target in lineup.fitted(precision):
        cost_sites(
            target,
            job,
            cast_inputs(inputs, target),
            prepare,
            lineup.request.seconds,
            told,
            outcome.sites.append,
        )

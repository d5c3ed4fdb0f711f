"""All jobs of one comparison, one after the other, and what they found so far."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from attnsurgeon.bench.engines import Place
from attnsurgeon.bench.findings import Failure, Job
from attnsurgeon.bench.job import Outcome, run_job
from attnsurgeon.bench.lineup import Lineup, Tell
from attnsurgeon.bench.memory import bounded_memory, is_out_of_memory, release_memory
from attnsurgeon.bench.precision import borrowed_tf32, precision_of
from attnsurgeon.bench.request import Batch
from attnsurgeon.bench.results import Report
from attnsurgeon.errors import is_interrupt

_REPORT = "_attnsurgeon_report"


class BenchInterrupted(KeyboardInterrupt):
    """An interrupt after something had been measured: `report` holds it."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


def measured_before(error: BaseException) -> Report | None:
    """Return what had been measured when an error or an interrupt ended a comparison, if any."""
    if isinstance(error, BenchInterrupted):
        return error.report
    report: Report | None = getattr(error, _REPORT, None)
    return report


@dataclass
class Session:
    """All jobs of one comparison, and what they have found so far."""

    lineup: Lineup
    folder: Path
    tell: Tell
    environment: dict[str, Any]
    outcome: Outcome = field(default_factory=Outcome)
    failures: list[Failure] = field(default_factory=list)

    def run(self) -> None:
        """Run all jobs; too little memory is noted.

        Whatever else ends them carries what was measured before; see measured_before.

        Raises:
            BenchInterrupted: an interrupt.
        """
        try:
            for number, wanted in enumerate(self.lineup.request.jobs):
                self._run_within_memory(number, *wanted)
        except (Exception, KeyboardInterrupt) as error:
            report = self.report(is_interrupted=True) if self.outcome.timings else None
            if not is_interrupt(error):
                setattr(error, _REPORT, report)
                raise
            if report is None:
                raise KeyboardInterrupt from None
            raise BenchInterrupted(report) from None

    def _run_within_memory(
        self, number: int, engine: str, precision: str | None, batch: Batch
    ) -> None:
        request = self.lineup.request
        place = Place(request.device, request.threads, self.folder, precision, request.train)
        try:
            with bounded_memory(request.device), borrowed_tf32(allowed=precision == "tf32"):
                self._run(number, engine, precision, batch, place)
        except Exception as error:
            if is_interrupt(error) or not is_out_of_memory(error):
                raise
            tried = batch if isinstance(batch, int) else 1
            self._fail(self._job(engine, precision, tried))
        finally:
            release_memory()

    def _run(
        self, number: int, engine: str, precision: str | None, batch: Batch, place: Place
    ) -> None:
        if isinstance(batch, str):
            told = functools.partial(self._tell, number, f"{engine}, batch {batch}")
            found = self._largest(engine, precision, place, told)
            if found is None:
                return
            batch = found
        job = self._job(engine, precision, batch)
        told = functools.partial(self._tell, number, str(job))
        try:
            run_job(self.lineup, job, precision, place, told, self.outcome)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            self._fail(job)

    def _largest(self, engine: str, precision: str | None, place: Place, tell: Tell) -> int | None:
        """Return the largest batch that fits, unless it is measured anyway or there is none."""
        fits, too_large = self.lineup.largest_batch(engine, precision, place, tell)
        if not fits:
            self._fail(self._job(engine, precision, 1))
            return None
        what = str(self._job(engine, precision, 0)).replace(", batch 0", "")
        self.environment["notes"].append(
            f"largest batch that fits on {what}: {fits} ({too_large} does not)"
        )
        return None if fits in self.lineup.request.batches else fits

    def _job(self, engine: str, precision: str | None, batch: int) -> Job:
        request = self.lineup.request
        own = precision or precision_of(self.lineup.targets[0])
        device = str(request.device)
        return Job(engine, device, batch, own, request.channels_last, request.train)

    def _tell(self, number: int, job: str, text: str, share: float) -> None:
        self.tell(f"{job}: {text}", (number + share) / len(self.lineup.request.jobs))

    def _fail(self, job: Job) -> None:
        what = f"batch {job.batch} does not fit on {job.engine}, {job.precision}"
        own = (job.engine, job.batch, job.precision)
        if any((run.engine, run.batch, run.precision) == own for run in self.outcome.timings):
            what = f"{what}, with --per-site or --profile"  # the job itself was timed
        self.failures.append(Failure(job, f"out of memory: {what}"))

    def report(self, *, is_interrupted: bool = False) -> Report:
        """Return all that was found."""
        ceilings = [one.to_json() for one in self.lineup.known_ceilings]
        return Report(
            environment={**self.environment, "ceilings": ceilings},
            runs=tuple(self.outcome.timings),
            comparisons=tuple(self.outcome.comparisons),
            failures=tuple(self.failures),
            sites=tuple(self.outcome.sites),
            profiles=tuple(self.outcome.profiles),
            is_interrupted=is_interrupted,
        )

"""Compare the speed of networks: read them, try them, time them in turns, and judge."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnsurgeon.arguments import typed
from attnsurgeon.bench.cost import check_axes, check_comparable, count_cost
from attnsurgeon.bench.engines import Place
from attnsurgeon.bench.environment import describe
from attnsurgeon.bench.findings import Failure, Job
from attnsurgeon.bench.inputs import common_example, make_inputs
from attnsurgeon.bench.job import Field, JobInterrupted, Outcome, largest_batch, run_job
from attnsurgeon.bench.memory import bounded_memory, is_out_of_memory, release_memory
from attnsurgeon.bench.per_site import check_sites
from attnsurgeon.bench.precision import borrowed_tf32, precision_of
from attnsurgeon.bench.quiet import borrowed_threads
from attnsurgeon.bench.request import Batch, Request, check_request
from attnsurgeon.bench.results import Report
from attnsurgeon.bench.targets import Target, read_targets
from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.errors import BadOption
from attnsurgeon.network import check_mode

Progress = Callable[[str, float], None]


class BenchInterrupted(KeyboardInterrupt):
    """An interrupt after something had been measured: `report` holds it."""

    def __init__(self, report: Report) -> None:
        super().__init__()
        self.report = report


@typed
def compare_speed(
    targets: Sequence[str | os.PathLike[str] | nn.Module],
    *,
    engines: Sequence[str] = ("eager",),
    device: str = "auto",
    batches: Sequence[int | str] = (1,),
    threads: int | None = None,
    seconds: float = 10.0,
    input_size: tuple[int, int] | None = None,
    precisions: Sequence[str] = (),
    channels_last: bool = False,
    train: bool = False,
    per_site: bool = False,
    profile: bool = False,
    example: Any = None,
    progress: Progress | None = None,
    command: str | None = None,
) -> Report:
    """Time networks against the first of them, or one against its own untouched host.

    All gates are open, all sides see the same input, and modules that are passed in are copied.
    Threads, random state and garbage collector are given back as they were. A job that does not
    fit into memory is told in the report's failures, and the others go on.

    Args:
        targets: files of attnsurgeon, names of models (random weights; timm's behind `timm:`),
            .onnx or TorchScript .pt files, or modules. One alone that holds attention is compared
            with its own host; another one alone is only timed.
        engines: names of engine_names().
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        batches: numbers of images per call; `max` is the largest that fits into memory.
        threads: CPU threads of every engine; torch's present number by default.
        seconds: of measuring for each job, shared by all targets, and with `per_site` for each
            site; translating and compiling come on top, and as much again where the ratio has not
            settled.
        input_size: height and width; the first target's own by default.
        precisions: of fp32, tf32, bf16, fp16; the targets' own, without TF32, by default.
        channels_last: lay maps out with the channels last.
        train: time whole steps of SGD, half precisions under autocast.
        per_site: time each site alone as well.
        profile: add the engine's own per-operator tables.
        example: an input, or a tuple of inputs, for modules that do not take their host's image.
        progress: is called with what is being done and the share of all that is done, from 0 to
            1, never while something is timed; what it raises ends the comparison.
        command: what the user typed, for the record.

    Raises:
        UnknownName: no such model, engine or precision.
        BadOption: a number out of range, targets that cannot be compared, or no batch that fits.
        BadFile: a file that is not what it should be.
        HostUnusable: a target does not run on the input, or torch.inference_mode() is on.
        EngineUnavailable: an engine or device that is not there, or fell back.
        ExportRefused: a target that cannot be translated for the engine.
        BenchInterrupted: a KeyboardInterrupt, with what was measured before it.

    Example:
        >>> from attnsurgeon import compare_speed
        >>> report = compare_speed(["digits"], seconds=0.1)
        >>> report.runs[0].median_ms > 0
        True
    """
    check_mode()
    request = check_request(
        engines, device, batches, threads, seconds, input_size, precisions,
        channels_last=channels_last, train=train, per_site=per_site, profile=profile,
    )  # fmt: skip
    if not targets:
        raise BadOption("name at least one target: a file, or a model such as resnet50")
    tell = progress or (lambda text, share: None)
    tell("reading the targets", 0.0)
    with (
        borrowed_threads(request.threads),
        borrowed_randomness(0),
        tempfile.TemporaryDirectory(prefix="attnsurgeon-") as folder,
    ):
        lineup = _line_up(read_targets(targets, example), request)
        typed = command or f"compare_speed({[target.name for target in lineup.targets]})"
        environment = describe(request, lineup.targets, lineup.example, typed)
        session = _Session(lineup, Path(folder), tell, environment)
        for number, wanted in enumerate(request.jobs):
            session.run(number, *wanted)
    tell("done", 1.0)
    if not session.outcome.timings:
        raise BadOption(f"{session.failures[0].reason}; give a smaller --batch, or --batch max")
    return session.report()


@dataclass
class _Session:
    """All jobs of one comparison, and what they have found so far."""

    lineup: Field
    folder: Path
    tell: Progress
    environment: dict[str, Any]
    outcome: Outcome = field(default_factory=Outcome)
    failures: list[Failure] = field(default_factory=list)

    def run(self, number: int, engine: str, precision: str | None, batch: Batch) -> None:
        """Run one job; too little memory is noted."""
        request = self.lineup.request
        place = Place(request.device, request.threads, self.folder, precision, request.train)
        try:
            with bounded_memory(request.device), borrowed_tf32(allowed=precision == "tf32"):
                self._run(number, engine, precision, batch, place)
        except KeyboardInterrupt as stop:
            if isinstance(stop, JobInterrupted):
                self._take(stop.outcome)
            if not self.outcome.timings:
                raise
            raise BenchInterrupted(self.report(is_interrupted=True)) from None
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            tried = batch if isinstance(batch, int) else 1
            self._fail(self._job(engine, precision, tried))
        finally:
            release_memory()

    def _run(
        self, number: int, engine: str, precision: str | None, batch: Batch, place: Place
    ) -> None:
        label = self._job(engine, precision, 0)
        if isinstance(batch, str):
            told = functools.partial(self._tell, number, f"{engine}, batch {batch}")
            fits, too_large = largest_batch(self.lineup, engine, precision, place, told)
            if not fits:
                self._fail(self._job(engine, precision, 1))
                return
            what = str(label).replace(", batch 0", "")
            self.environment["notes"].append(
                f"largest batch that fits on {what}: {fits} ({too_large} does not)"
            )
            batch = fits
        job = self._job(engine, precision, batch)
        told = functools.partial(self._tell, number, str(job))
        self._take(run_job(self.lineup, job, precision, place, told))

    def _job(self, engine: str, precision: str | None, batch: int) -> Job:
        request = self.lineup.request
        own = precision or precision_of(self.lineup.targets[0])
        device = str(request.device)
        return Job(engine, device, batch, own, request.channels_last, request.train)

    def _tell(self, number: int, job: str, text: str, share: float) -> None:
        self.tell(f"{job}: {text}", (number + share) / len(self.lineup.request.jobs))

    def _fail(self, job: Job) -> None:
        reason = f"out of memory: batch {job.batch} does not fit on {job.engine}, {job.precision}"
        self.failures.append(Failure(job, reason))

    def _take(self, found: Outcome) -> None:
        self.outcome.timings += found.timings
        self.outcome.comparisons += found.comparisons
        self.outcome.sites += found.sites
        self.outcome.profiles += found.profiles

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


def _line_up(targets: Sequence[Target], request: Request) -> Field:
    """Try every target once, and refuse what could not be compared later.

    Raises:
        BadOption: an engine that a target is not made for, or targets of different kinds.
        HostUnusable: a target does not run on the input.
    """
    for target in targets:
        _check_engines(target, request)
    if request.per_site:
        check_sites(targets)
    example = common_example(targets, request.input_size)
    cpu = torch.device("cpu")
    numbers = [batch for batch in request.batches if isinstance(batch, int)]
    for batch in numbers:
        for target in targets:
            check_axes(target, make_inputs(example, batch, cpu))
    inputs = make_inputs(example, 1, cpu)
    costs = tuple(count_cost(target, inputs) for target in targets)
    check_comparable(targets, costs)
    return Field(tuple(targets), costs, example, request)


def _check_engines(target: Target, request: Request) -> None:
    for engine in request.engines:
        if target.only and engine not in target.only:
            raise BadOption(
                f"{target.name} cannot run on {engine}; give --engine {target.only[0]} alone"
            )
    if request.train and target.only:
        raise BadOption(f"{target.name} was exported for inference; leave it or --train out")
    if target.keeps_precision and request.precisions != (None,):
        own = precision_of(target)
        wrong = [precision for precision in request.precisions if precision != own]
        if wrong:
            raise BadOption(
                f"{target.name} holds {own} numbers and cannot be timed in {wrong[0]}; "
                "leave --precision out"
            )

"""Compare the speed of networks: read them, try them, time them in turns, and judge."""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnsurgeon.bench import engines as known_engines
from attnsurgeon.bench.cost import Cost, check_axes, check_comparable, count_cost
from attnsurgeon.bench.engines import Place
from attnsurgeon.bench.environment import describe
from attnsurgeon.bench.interval import estimate, verdict
from attnsurgeon.bench.quiet import borrowed_threads
from attnsurgeon.bench.request import Request, check_request
from attnsurgeon.bench.results import Comparison, Report, Timing
from attnsurgeon.bench.targets import (
    Inputs,
    Target,
    cast_inputs,
    common_example,
    make_inputs,
    read_targets,
)
from attnsurgeon.bench.timing import Race, race
from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.errors import BadOption

Progress = Callable[[str, float], None]


def compare_speed(
    targets: Sequence[str | os.PathLike[str] | nn.Module],
    *,
    engines: Sequence[str] = ("eager",),
    device: str = "auto",
    batches: Sequence[int] = (1,),
    threads: int | None = None,
    seconds: float = 10.0,
    input_size: tuple[int, int] | None = None,
    example: Any = None,
    progress: Progress | None = None,
) -> Report:
    """Time networks against the first of them, or one against its own untouched host.

    All gates are open, all sides see the same input, and modules that are passed in are copied.
    Threads, random state and garbage collector are given back as they were.

    Args:
        targets: files of attnsurgeon, names of models (random weights), .onnx or TorchScript .pt
            files, or modules. One alone that holds attention is compared with its own host;
            another one alone is only timed.
        engines: eager, torchscript, onnxruntime, compile.
        device: auto (CUDA where there is one), cpu, cuda or cuda:N.
        batches: numbers of images per call.
        threads: CPU threads of every engine; torch's present number by default.
        seconds: of measuring for each engine and batch, shared by all targets; translating and
            compiling come on top.
        input_size: height and width; the first target's own by default.
        example: an input, or a tuple of inputs, for modules that do not take their host's image.
        progress: is called with what is being done and the share of all that is done, from 0 to
            1, never while something is timed; what it raises ends the comparison.

    Raises:
        UnknownName: no such model or engine.
        BadOption: a number out of range, or targets that cannot be compared.
        BadFile: a file that is not what it should be.
        HostUnusable: a target does not run on the input.
        EngineUnavailable: an engine or device that is not there, or fell back.
        ExportRefused: a target that cannot be translated for the engine.

    Example:
        >>> from attnsurgeon import compare_speed
        >>> report = compare_speed(["digits"], seconds=0.1)
        >>> report.runs[0].median_ms > 0
        True
    """
    request = check_request(engines, device, batches, threads, seconds, input_size)
    if not targets:
        raise BadOption("name at least one target: a file, or a model such as resnet50")
    tell = progress or (lambda text, share: None)
    tell("reading the targets", 0.0)
    with (
        borrowed_threads(request.threads),
        borrowed_randomness(0),
        tempfile.TemporaryDirectory(prefix="attnsurgeon-") as folder,
    ):
        field = _line_up(read_targets(targets, example), request)
        environment = describe(request.device, request.threads, seconds, field.targets)
        place = Place(request.device, request.threads, Path(folder))
        runs: list[Timing] = []
        comparisons: list[Comparison] = []
        for done, (engine, batch) in enumerate(request.jobs):
            told = functools.partial(_tell_job, tell, request, done)
            timings, found = _run_job(field, engine, batch, place, seconds, told)
            runs += timings
            comparisons += _compare(timings, found)
    tell("done", 1.0)
    return Report(environment, tuple(runs), tuple(comparisons))


@dataclass(frozen=True)
class _Field:
    """The targets as they start: comparable, with what each costs, and an input for one image."""

    targets: tuple[Target, ...]
    costs: tuple[Cost, ...]
    example: Inputs


def _line_up(targets: Sequence[Target], request: Request) -> _Field:
    """Try every target once, and refuse what could not be compared later.

    Raises:
        BadOption: an engine that a target is not made for, or targets of different kinds.
        HostUnusable: a target does not run on the input.
    """
    for target in targets:
        for engine in request.engines:
            if target.only not in (None, engine):
                raise BadOption(
                    f"{target.name} cannot run on {engine}; give --engine {target.only} alone"
                )
    example = common_example(targets, request.input_size)
    cpu = torch.device("cpu")
    for batch in request.batches:
        for target in targets:
            check_axes(target, make_inputs(example, batch, cpu))
    inputs = make_inputs(example, request.batches[0], cpu)
    costs = tuple(count_cost(target, inputs) for target in targets)
    check_comparable(targets, costs)
    return _Field(tuple(targets), costs, example)


def _tell_job(tell: Progress, request: Request, done: int, text: str, share: float) -> None:
    engine, batch = request.jobs[done]
    tell(f"{engine}, batch {batch}: {text}", (done + share) / len(request.jobs))


def _run_job(
    field: _Field, engine: str, batch: int, place: Place, seconds: float, tell: Progress
) -> tuple[list[Timing], Race]:
    prepare = known_engines.get(engine).prepare
    inputs = make_inputs(field.example, batch, place.device)
    runners = []
    for target in field.targets:
        tell(f"preparing {target.name}", 0.0)
        runners.append(prepare(target, cast_inputs(inputs, target), place))
    found = race(runners, seconds, functools.partial(tell, "measuring"))
    timings = [
        Timing(
            target=target.name,
            engine=engine,
            device=str(place.device),
            batch=batch,
            samples_ms=samples,
            parameters=cost.parameters,
            macs=cost.macs,
            file_bytes=cost.file_bytes,
            provider=runner.provider,
            weights=target.weights,
        )
        for target, cost, samples, runner in zip(
            field.targets, field.costs, found.samples_ms, runners, strict=True
        )
    ]
    return timings, found


def _compare(timings: Sequence[Timing], found: Race) -> list[Comparison]:
    """Judge every timing but the first against the first, pair by pair."""
    baseline = timings[0]
    comparisons = []
    for i, timing in enumerate(timings[1:], start=1):
        ratio = estimate(found.log_ratios(i))
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
            )
        )
    return comparisons

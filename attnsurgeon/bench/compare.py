"""Compare the speed of networks: read them, try them, time them in turns, and judge."""

from __future__ import annotations

import inspect
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from attnsurgeon.arguments import typed
from attnsurgeon.bench.cost import check_batch, check_comparable, count_cost, fixed_batch
from attnsurgeon.bench.environment import describe
from attnsurgeon.bench.inputs import common_example, make_inputs
from attnsurgeon.bench.lineup import Lineup
from attnsurgeon.bench.per_site import check_sites
from attnsurgeon.bench.precision import precision_of
from attnsurgeon.bench.quiet import borrowed_threads
from attnsurgeon.bench.request import Request, check_request
from attnsurgeon.bench.results import Report
from attnsurgeon.bench.session import Session
from attnsurgeon.bench.targets import Target, read_targets
from attnsurgeon.borrow import borrowed_randomness
from attnsurgeon.errors import BadOption
from attnsurgeon.network import check_mode

Progress = Callable[[str, float], None]


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
    fit into memory is told in the report's failures, and the others go on. Of whatever else ends
    it, measured_before tells what had been measured.

    Args:
        targets: files of attnsurgeon, names of models (random weights; timm's behind `timm:`),
            .onnx, TorchScript .pt or .pt2 files, or modules. One alone that holds attention is
            compared with its own host; another one alone is only timed.
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
    asked = dict(locals())
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
        environment = describe(
            request, lineup.targets, lineup.example, command or _call_in_words(asked)
        )
        session = Session(lineup, Path(folder), tell, environment)
        session.run()
    tell("done", 1.0)
    if not session.outcome.timings:
        raise BadOption(f"{session.failures[0].reason}; give a smaller --batch, or --batch max")
    return session.report()


def _call_in_words(asked: Mapping[str, Any]) -> str:
    """Return the call of compare_speed, with the arguments that are not the defaults."""
    things = [
        type(t).__name__ if isinstance(t, nn.Module) else os.fspath(t) for t in asked["targets"]
    ]
    told = [repr(things)]
    for name, parameter in inspect.signature(compare_speed).parameters.items():
        given = asked[name]
        if name in ("targets", "progress", "command") or given is parameter.default:
            continue
        if name == "example":  # a tensor is no word
            told.append("example=...")
        elif given != parameter.default:
            told.append(f"{name}={given!r}")
    return f"compare_speed({', '.join(told)})"


def _line_up(targets: Sequence[Target], request: Request) -> Lineup:
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
    for batch in request.batches:
        for target in targets:
            check_batch(target, batch)
    fixed = next((own for target in targets if (own := fixed_batch(target))), 1)
    inputs = make_inputs(example, fixed, torch.device("cpu"))
    costs = tuple(count_cost(target, inputs) for target in targets)
    check_comparable(targets, costs)
    return Lineup(tuple(targets), costs, example, request)


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

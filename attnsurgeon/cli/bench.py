"""`attnsurgeon bench`: what attention costs in time, against the untouched network."""

from __future__ import annotations

import shlex
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from attnsurgeon.cli.hosts import OwnHost
from attnsurgeon.cli.shell import is_integer, list_command, say, say_json, tell

# Known without torch, whose import --help must not wait for; a test holds it to the registry.
ENGINES = (
    "eager",
    "compile",
    "compile-max-autotune",
    "compile-cudagraphs",
    "cudagraphs",
    "torchscript",
    "torchscript-frozen",
    "aotinductor",
    "onnxruntime",
    "onnxruntime-tensorrt",
)
PRECISIONS = ("fp32", "tf32", "bf16", "fp16")
LARGEST = "max"

EXAMPLES = """\b
Examples:
  attnsurgeon bench resnet50_se.safetensors
  attnsurgeon bench resnet50_se.safetensors --engine eager onnxruntime --batch 1 8 max --threads 2
  attnsurgeon bench resnet50 timm:seresnet50 resnet50_se.safetensors -o results.json -o page.html
  attnsurgeon bench resnet50_se.safetensors --per-site --profile
  attnsurgeon bench --compare old.json new.json --fail-above 3%

Exit codes: 5 if --fail-above was passed; those of attnsurgeon --help.
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    lists = list_command(1, engine=_is_engine, batch=_is_batch, precision=PRECISIONS.__contains__)
    command = type("Bench", (_Remembers, lists), {})
    app.command("bench", cls=command, short_help="Time what attention costs.", epilog=EXAMPLES)(
        bench
    )


class _Remembers:
    """Keeps the words that were typed, for the record in the results."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        ctx.meta[__name__] = shlex.join(["attnsurgeon", "bench", *args])
        return super().parse_args(ctx, args)  # type: ignore[misc]


def _is_engine(word: str) -> bool:
    """Tell whether a word is meant as one more engine; so is the beginning of a name."""
    return any(name.startswith(word) for name in ENGINES)


def _is_batch(word: str) -> bool:
    return word == LARGEST or is_integer(word)


def bench(
    ctx: typer.Context,
    targets: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="TARGET...",
            help="Files of attnsurgeon, model names (timm's as timm:NAME), .onnx, .pt, .pt2.",
        ),
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help=f"{', '.join(ENGINES)}; eager by default.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    batch: Annotated[
        list[str] | None,
        typer.Option(help="Images per run; max is the largest that fits; 1 by default."),
    ] = None,
    precision: Annotated[
        list[str] | None, typer.Option(help="fp32, tf32, bf16, fp16; the network's by default.")
    ] = None,
    channels_last: Annotated[
        bool, typer.Option("--channels-last", help="Lay maps out with the channels last.")
    ] = False,
    train: Annotated[
        bool, typer.Option("--train", help="Time forward, backward and a step of SGD.")
    ] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; torch's own by default.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Measuring time for each engine, precision and batch.")
    ] = 10.0,
    input_size: Annotated[
        str | None, typer.Option(help="H or H,W in pixels; the network's own by default.")
    ] = None,
    host: OwnHost = None,
    per_site: Annotated[
        bool, typer.Option("--per-site", help="Time each site alone too, --seconds for each.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Add the engine's own per-operator table.")
    ] = False,
    compare: Annotated[
        bool, typer.Option("--compare", help="Take two results files, and tell what changed.")
    ] = False,
    fail_above: Annotated[
        str | None, typer.Option(help="With --compare: exit 5 if slower by more, such as 3%.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print what each key of the results means.")
    ] = False,
    output: Annotated[
        list[Path] | None,
        typer.Option("-o", "--output", help="Also write .json, .csv, .md, .html, .png or .svg."),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time networks against each other, interleaved, with every gate open.

    One target is compared with its own untouched host; of several, all with the first. The
    ratio is that of the faster half of the blocks of each, with a 95 % interval; where others
    hold the machine up, the doubts say what was compared instead.
    """
    if schema:
        from attnsurgeon.bench.schema import SCHEMA

        say_json(SCHEMA)
        return
    if compare or fail_above is not None:
        if compare:
            _check_alone(ctx)
        _compare(targets or [], fail_above, as_json=as_json, is_asked=compare)
        return
    from attnsurgeon.bench.compare import compare_speed
    from attnsurgeon.bench.session import BenchInterrupted, measured_before
    from attnsurgeon.cli.shell import read_size
    from attnsurgeon.host import naming_host
    from attnsurgeon.report.files import check_results, write_results
    from attnsurgeon.report.live import live_progress
    from attnsurgeon.report.speed import show_report

    outputs = list({path.resolve(): path for path in output or []}.values())
    for path in outputs:
        check_results(path, force=force)
    stop: BaseException | None = None
    try:
        with live_progress(tell) as progress, naming_host(host):
            report = compare_speed(
                targets or [],
                engines=tuple(engine or _default_engines(targets or [])),
                device=device,
                batches=tuple(_read_batch(word) for word in batch or ("1",)),
                threads=threads,
                seconds=seconds,
                input_size=read_size(input_size),
                precisions=tuple(precision or ()),
                channels_last=channels_last,
                train=train,
                per_site=per_site,
                profile=profile,
                progress=progress,
                command=ctx.meta[__name__],
            )
    except (Exception, BenchInterrupted) as error:
        found = measured_before(error)
        if found is None:
            raise
        report, stop = found, error
    with ExitStack() as files:  # what stdout or one of them cannot take, the others still get
        for path in reversed(outputs):
            files.callback(write_results, report.to_json(), path, force=force)
        say_json(report.to_json()) if as_json else say(show_report(report))
    if stop is None:
        return
    kept = f" and is in {', '.join(map(str, outputs))}" if outputs else ""
    cut = "interrupted" if isinstance(stop, BenchInterrupted) else "not finished"
    tell(f"{cut}; what was measured before stands above{kept}")
    raise typer.Exit(130) if isinstance(stop, BenchInterrupted) else stop


def _check_alone(ctx: typer.Context) -> None:
    """Refuse options that --compare would leave unused.

    Raises:
        BadOption: one was given.
    """
    from attnsurgeon.errors import BadOption

    for option in ctx.command.params:
        name = str(option.name)
        source = ctx.get_parameter_source(name)
        is_given = source is not None and source.name == "COMMANDLINE"
        if is_given and name not in ("targets", "compare", "fail_above", "as_json"):
            flag = f"--{name.replace('_', '-')}"
            raise BadOption(f"{flag} is of a measurement; leave it or --compare out")


def _compare(files: list[str], fail_above: str | None, *, as_json: bool, is_asked: bool) -> None:
    """Tell what changed between two results files.

    Raises:
        BadOption: not two files, or a limit that is no share.
        TooSlow: a change is above the limit.
    """
    from attnsurgeon.bench.regression import compare_results, read_results
    from attnsurgeon.errors import BadOption
    from attnsurgeon.report.regression import show_regression

    if not is_asked:
        raise BadOption("--fail-above goes with --compare old.json new.json")
    if len(files) != 2:
        raise BadOption(f"--compare takes two results files, old and new, not {len(files)}")
    most = None if fail_above is None else _read_share(fail_above)
    found = compare_results(*(read_results(file) for file in files))
    say_json(found.to_json()) if as_json else say(show_regression(found))
    if most is not None:
        found.check(most)


def _read_share(text: str) -> float:
    """Return 3% or 3 as 0.03.

    Raises:
        BadOption: no number of per cent, or a negative one.
    """
    from attnsurgeon.errors import BadOption

    try:
        share = float(text.strip().removesuffix("%")) / 100
    except ValueError:
        share = -1.0
    if not 0 <= share < float("inf"):
        raise BadOption(f"--fail-above takes per cent, such as 3%, not {text!r}")
    return share


def _read_batch(word: str) -> int | str:
    return int(word) if is_integer(word) else word


def _default_engines(targets: list[str]) -> tuple[str, ...]:
    """Return the engine that the first target is made for."""
    suffix = Path(targets[0]).suffix.lower() if targets else ""
    return {".onnx": ("onnxruntime",), ".pt": ("torchscript",)}.get(suffix, ("eager",))

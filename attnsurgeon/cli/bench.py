"""`attnsurgeon bench`: what attention costs in time, against the untouched network."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnsurgeon.cli.hosts import OwnHost
from attnsurgeon.cli.shell import is_integer, list_command, say, say_json, tell

ENGINES = ("eager", "torchscript", "onnxruntime", "compile")

EXAMPLES = """\b
Examples:
  attnsurgeon bench resnet50_se.safetensors
  attnsurgeon bench resnet50_se.safetensors --engine eager onnxruntime --batch 1 8 --threads 2
  attnsurgeon bench resnet50 resnet50_se.safetensors resnet50_gc.safetensors -o results.json
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    lists = list_command(1, engine=ENGINES.__contains__, batch=is_integer)
    app.command("bench", cls=lists, short_help="Time what attention costs.", epilog=EXAMPLES)(bench)


def bench(
    targets: Annotated[
        list[str],
        typer.Argument(metavar="TARGET...", help="Files of attnsurgeon, model names, .onnx, .pt."),
    ],
    engine: Annotated[
        list[str] | None, typer.Option(help="eager, torchscript, onnxruntime or compile.")
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    batch: Annotated[list[int] | None, typer.Option(help="Images per run; 1 by default.")] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads; torch's own by default.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(help="Measuring time for each engine and batch.")
    ] = 10.0,
    input_size: Annotated[
        str | None, typer.Option(help="H or H,W in pixels; the network's own by default.")
    ] = None,
    host: OwnHost = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Also write the JSON to this file.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Time networks against each other, interleaved, with every gate open.

    One target is compared with its own untouched host; of several, all with the first. The
    ratio is taken pair by pair and comes with a 95 % interval.
    """
    import json

    from attnsurgeon.bench import compare_speed
    from attnsurgeon.cli.shell import read_size
    from attnsurgeon.host import naming_host
    from attnsurgeon.outputs import atomic_output, check_output
    from attnsurgeon.report.speed import show_report

    if output is not None:
        check_output(output, force=force)
    with naming_host(host):
        report = compare_speed(
            targets,
            engines=tuple(engine or _default_engines(targets)),
            device=device,
            batches=tuple(batch or (1,)),
            threads=threads,
            seconds=seconds,
            input_size=read_size(input_size),
            progress=lambda text, share: tell(f"{share:4.0%} {text}"),
        )
    if output is not None:
        with atomic_output(output, force=force) as part:
            part.write_text(json.dumps(report.to_json(), indent=2) + "\n", encoding="utf-8")
    say_json(report.to_json()) if as_json else say(show_report(report))


def _default_engines(targets: list[str]) -> tuple[str, ...]:
    """Return the engine that the first target is made for."""
    return {".onnx": ("onnxruntime",), ".pt": ("torchscript",)}.get(
        Path(targets[0]).suffix.lower(), ("eager",)
    )

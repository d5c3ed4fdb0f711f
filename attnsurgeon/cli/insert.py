"""`attnsurgeon insert`: put attention into a network and write it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnsurgeon.cli.hosts import (
    CheckpointKey,
    Inputs,
    ModelArguments,
    OwnHost,
    is_shape,
    read_arguments,
)
from attnsurgeon.cli.shell import (
    is_assignment,
    is_integer,
    list_command,
    read_assignments,
    say,
    say_json,
    tell,
)

EXAMPLES = """\b
Examples:
  attnsurgeon insert resnet50 --block se
  attnsurgeon insert resnet50 --block gc --placement standard --stage 2 3 4 --set ratio=1/4
  attnsurgeon insert resnext50_32x4d --block sk --placement replace -o sknet50.safetensors
  attnsurgeon insert resnet18 --checkpoint mine.pth --num-classes 10 --block cbam --at 'layer3.*'
  attnsurgeon insert resnet50_se.safetensors --block gc --at layer4.2 -o both.onnx
  attnsurgeon insert nets/mine.py:build --input 1,3,32,32 --checkpoint mine.pth --block se
  attnsurgeon insert timm:resnet50 --plan plan.json
  attnsurgeon insert resnet50 --block path/to/mine.py:MyAttention
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    lists = list_command(
        1,
        at=None,
        exclude=None,
        stage=is_integer,
        set=is_assignment,
        input=is_shape,
        model_arg=is_assignment,
    )
    app.command(
        "insert", cls=lists, short_help="Put attention into a network, unchanged.", epilog=EXAMPLES
    )(insert)


def insert(
    model: Annotated[
        str,
        typer.Argument(
            help="A torchvision name, `digits`, timm:NAME, your own FILE.py:FACTORY or "
            "MODULE:FACTORY, or a file of attnsurgeon."
        ),
    ],
    block: Annotated[
        str | None,
        typer.Option(help="A name of `attnsurgeon blocks`, timm:NAME, or path/to/file.py:Class."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="A .safetensors, .onnx or .pt file to write."),
    ] = None,
    at: Annotated[
        list[str] | None, typer.Option(help="Shell patterns of block paths, as 'layer3.*'.")
    ] = None,
    exclude: Annotated[
        list[str] | None, typer.Option(help="Shell patterns of block paths to leave out.")
    ] = None,
    stage: Annotated[
        list[int] | None, typer.Option(help="Stages (runs of one feature size), from 1.")
    ] = None,
    every: Annotated[int, typer.Option(help="Take each K-th of the chosen blocks.")] = 1,
    kind: Annotated[
        str | None,
        typer.Option(help="residual (default), merge, layer or plain; see `attnsurgeon sites`."),
    ] = None,
    placement: Annotated[
        str, typer.Option(help="post, standard, pre, identity, conv or replace.")
    ] = "post",
    gate: Annotated[
        str, typer.Option(help="How it is let in: mix (a number), centred, or layer (none).")
    ] = "mix",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Options of the block, as reduction=8.")
    ] = None,
    plan: Annotated[
        Path | None,
        typer.Option(help="Several in one go: JSON as --dry-run --json prints it, edited."),
    ] = None,
    weights: Annotated[
        str, typer.Option(help="DEFAULT, a name of torchvision's weights, or none (random).")
    ] = "DEFAULT",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A file of weights for the network.")
    ] = None,
    checkpoint_key: CheckpointKey = None,
    num_classes: Annotated[
        int | None,
        typer.Option(help="Of the network, where neither the default nor the checkpoint's."),
    ] = None,
    model_arg: ModelArguments = None,
    input_: Inputs = None,
    host: OwnHost = None,
    seed: Annotated[int, typer.Option(help="Of the new weights.")] = 0,
    stack: Annotated[
        bool, typer.Option("--stack", help="Put it also where the same block is already.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be done; write nothing.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Insert attention behind closed gates: every output stays bitwise what it was.

    By default after every residual block (--placement post). The new network is checked before
    it is written: equal outputs in eval and train mode, and every gate able to learn.
    """
    from attnsurgeon.job import InsertJob, run_insert
    from attnsurgeon.report.insertion import show_insertion

    job = InsertJob(
        model=model,
        block=block,
        output=output,
        at=tuple(at or ["*"]),
        exclude=tuple(exclude or ()),
        stages=tuple(stage or ()),
        every=every,
        kind=kind,
        placement=placement,
        options=read_assignments(set_ or (), "--set"),
        plan=plan,
        weights=weights,
        checkpoint=checkpoint,
        checkpoint_key=checkpoint_key,
        num_classes=num_classes,
        arguments=read_arguments(model_arg),
        inputs=tuple(input_ or ()),
        host=host,
        seed=seed,
        stack=stack,
        gate=gate,
        dry_run=dry_run,
        force=force,
    )
    done = run_insert(job, tell)
    for path, reason in done.skipped.items():
        tell(f"skipped {path}: {reason}")
    say_json(done.to_json()) if as_json else say(show_insertion(done))

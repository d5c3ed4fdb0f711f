"""`attnsurgeon export`: write a network for deployment, proven equal from disk."""

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
from attnsurgeon.cli.shell import is_assignment, list_command, read_size, say, say_json, tell

EXAMPLES = """\b
Examples:
  attnsurgeon export resnet50_se.safetensors -o resnet50_se.onnx
  attnsurgeon export resnet50_se.safetensors -o resnet50_se.pt --input-size 320,256
  attnsurgeon export resnet50_se.safetensors -o resnet50_se.pt2 --static
  attnsurgeon export resnet50_se.safetensors -o resnet50_se.pt2 --compile
  attnsurgeon export resnet50_se.safetensors -o model.py
  attnsurgeon export resnet50_se.safetensors -o resnet50_se_fp16.onnx --precision fp16
  attnsurgeon export resnet50_se.safetensors -o int8.onnx --precision int8 --images photos
  attnsurgeon export resnet50_se.safetensors --checkpoint trained.pth -o trained.onnx --opset 18
  attnsurgeon export mine_se.safetensors --host nets/mine.py:build -o mine_se.onnx
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    app.command(
        "export",
        cls=list_command(1, input=is_shape, model_arg=is_assignment),
        short_help="Write it for deployment, proven equal.",
        epilog=EXAMPLES,
    )(export)


def export(
    file: Annotated[str, typer.Argument(help="A file of attnsurgeon, a name, or FILE.py:FACTORY.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="A .onnx, .pt, .pt2 or .py file.")],
    opset: Annotated[int | None, typer.Option(help="ONNX operator set; 20 by default.")] = None,
    exporter: Annotated[
        str,
        typer.Option(help="Of .onnx: dynamo, torchscript, or auto (dynamo if it can)."),
    ] = "auto",
    optimize: Annotated[
        bool,
        typer.Option(
            "--optimize", help="Freeze a .pt file for inference: weights become constants."
        ),
    ] = False,
    compile: Annotated[
        bool, typer.Option("--compile", help="Make machine code of a .pt2 file; needs g++.")
    ] = False,
    precision: Annotated[
        str | None,
        typer.Option(help="fp32 (default), fp16, bf16 (.pt, .pt2) or int8 (.onnx, --images)."),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="Of int8: a folder of images to calibrate on.")
    ] = None,
    strip: Annotated[
        bool,
        typer.Option("--strip", help="Drop attention with gates at 0, and gates at 1."),
    ] = False,
    input_size: Annotated[
        str | None, typer.Option(help="H or H,W in pixels; the network's own by default.")
    ] = None,
    static: Annotated[
        bool, typer.Option("--static", help="Fix batch (1), height and width.")
    ] = False,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Trained weights of the same network, such as .pth.")
    ] = None,
    checkpoint_key: CheckpointKey = None,
    weights: Annotated[
        str, typer.Option(help="For a model name: DEFAULT, a name of weights, or none.")
    ] = "DEFAULT",
    num_classes: Annotated[
        int | None,
        typer.Option(help="Of a network by name, where neither the default nor the checkpoint's."),
    ] = None,
    model_arg: ModelArguments = None,
    input_: Inputs = None,
    host: OwnHost = None,
    keep_rejected: Annotated[
        bool, typer.Option("--keep-rejected", help="Keep a file that differs, as OUT.rejected.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Write a file for deployment, re-open it and compare it with the model.

    Formats by suffix: .onnx, .pt (TorchScript), .pt2 (torch.export), .py (plain code).

    The comparison runs with the gates as they are and with every gate opened at random, at
    batch 1, 2 and 5 and another input size. A file that differs is not kept (exit 4).

    --precision fp16 and bf16 files take and return that kind of number, int8 files float32. Each
    may differ from the model in fp32 by the tolerance of its precision, which --json tells.
    """
    from attnsurgeon.export import export_model
    from attnsurgeon.export.format import Settings, format_for
    from attnsurgeon.opening import open_target
    from attnsurgeon.outputs import check_output
    from attnsurgeon.report.artifact import show_artifact

    format_for(output).check(
        Settings(
            opset=opset,
            dynamic=not static,
            exporter=exporter,
            optimize=optimize,
            compile=compile,
            precision=precision,
            images=images,
            strip=strip,
        )
    )
    check_output(output, force=force)
    size = read_size(input_size)
    tell(f"loading {file}")
    opened = open_target(
        file,
        weights=weights,
        checkpoint=checkpoint,
        checkpoint_key=checkpoint_key,
        num_classes=num_classes,
        arguments=read_arguments(model_arg),
        inputs=input_ or (),
        host=host,
    )
    for notice in opened.notices:
        tell(notice)
    artifact = export_model(
        opened.model,
        output,
        opset=opset,
        exporter=exporter,
        optimize=optimize,
        compile=compile,
        precision=precision,
        images=images,
        strip=strip,
        input_size=size,
        static=static,
        force=force,
        keep_rejected=keep_rejected,
        progress=tell,
    )
    for notice in artifact.notices:
        tell(notice)
    say_json(artifact.to_json()) if as_json else say(show_artifact(artifact))

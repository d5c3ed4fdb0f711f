"""`attnsurgeon gates`: see whether the attention took."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnsurgeon.cli.hosts import OwnHost
from attnsurgeon.cli.shell import say, say_json, tell

EXAMPLES = """\b
Examples:
  attnsurgeon gates resnet50_se.safetensors --checkpoint trained.pth
  attnsurgeon gates trained.safetensors --images photos -o gates.png
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("gates", short_help="Show how far the gates opened.", epilog=EXAMPLES)(gates)


def gates(
    file: Annotated[Path, typer.Argument(help="A file of attnsurgeon insert or save_model.")],
    host: OwnHost = None,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Trained weights of the same network, such as .pth.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of images to measure on; else digits or noise.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A .png or .svg chart to write.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing chart.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show for each site how far its gates opened, and whether that matters.

    `varies`: how much the map differs from image to image (0: it only rescales). `output`: how
    far the output moves when this site alone is closed. `top-1`: images read otherwise then.
    """
    from attnsurgeon.opening import open_file
    from attnsurgeon.outputs import check_output
    from attnsurgeon.report.gates import openings_to_json, show_openings
    from attnsurgeon.training.images import sample_inputs
    from attnsurgeon.training.openings import measure_openings

    if output is not None:
        from attnsurgeon.report.gate_chart import check_chart

        check_chart(output)
        check_output(output, force=force)
    tell(f"loading {file}")
    model = open_file(file, host, checkpoint).model
    sample = sample_inputs(model, images)
    tell(f"watching {len(model.__dict__['_attnsurgeon_cuts'])} sites on {sample.source}")
    found = measure_openings(model, sample)
    if output is not None:
        from attnsurgeon.report.gate_chart import write_chart

        write_chart(found, sample, str(checkpoint or file), output, force=force)
        tell(f"writing {output}")
    name = str(checkpoint or file)
    if as_json:
        say_json(openings_to_json(name, found, sample, output))
    else:
        say(show_openings(name, found, sample))

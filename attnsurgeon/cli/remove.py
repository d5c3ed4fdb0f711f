"""`attnsurgeon remove`: take attention out again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnsurgeon.cli.hosts import OwnHost
from attnsurgeon.cli.shell import list_command, say, say_json, tell

EXAMPLES = """\b
Examples:
  attnsurgeon remove trained.safetensors --below 0.02
  attnsurgeon remove trained.safetensors --at 'layer1.*' --images photos -o less.safetensors
  attnsurgeon remove resnet50_se.safetensors
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    app.command(
        "remove",
        cls=list_command(1, at=None),
        short_help="Take attention out again.",
        epilog=EXAMPLES,
    )(remove)


def remove(
    file: Annotated[Path, typer.Argument(help="A file of attnsurgeon insert or save_model.")],
    host: OwnHost = None,
    at: Annotated[
        list[str] | None, typer.Option(help="Shell patterns of block paths, as 'layer3.*'.")
    ] = None,
    below: Annotated[
        float | None, typer.Option(help="Take out what training left this closed, as 0.02.")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="A .safetensors file to write.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of images to compare on; else digits or noise.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace an existing output.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Take out all attention, that of some sites, or that whose gates are nearly closed.

    If the host was frozen, all of it out gives the original tensors back byte for byte, which is
    shown by their hashes; how far the outputs move is measured in any case. Without any
    attention left, plain weights are written, for --checkpoint.
    """
    from attnsurgeon.removal import RemovalJob, run_removal
    from attnsurgeon.report.removal import show_removal

    job = RemovalJob(file, host, tuple(at or ()), below, output, images, force)
    done = run_removal(job, tell)
    say_json(done.to_json()) if as_json else say(show_removal(done))

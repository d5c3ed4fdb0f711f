"""The command line: one file per command; each parses, calls the library once, and reports."""

from __future__ import annotations

import gc
import io
import signal
import sys
from typing import Annotated, Any

import typer

from attnsurgeon.cli import (
    bench,
    blocks,
    demo,
    export,
    gates,
    insert,
    models,
    remove,
    show,
    sites,
    verify,
)
from attnsurgeon.cli.shell import Group

app = typer.Typer(
    cls=Group,
    name="attnsurgeon",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich help takes longer to draw than all else to import
    help="Insert attention into pretrained vision networks without changing a bit of what they "
    "compute; export them proven equal; measure what it costs.",
    epilog="Exit codes: 0 done, 2 something you can put right, 3 identity broken, 4 an export "
    "differs, 5 slower than --fail-above allows, 130 interrupted.",
)


def _version(wanted: bool) -> None:
    if wanted:
        from attnsurgeon import __version__

        sys.stdout.write(f"attnsurgeon {__version__}\n")
        raise typer.Exit


@app.callback()
def _top(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    own_block: Annotated[
        list[str] | None,
        typer.Option(help="Attention of your own that a file names: path/to/file.py:Class."),
    ] = None,
) -> None:
    """Hold what stands before a command."""
    if own_block:
        from attnsurgeon import blocks

        for text in own_block:
            blocks.learn(text)


for _command in (insert, export, bench, gates, show, remove, sites, blocks, models, verify, demo):
    _command.add_to(app)


def _terminate(number: int, frame: Any) -> None:
    sys.exit(128 + number)  # as an exception, so that partial files are taken away


def main() -> None:
    """Run the command line."""
    # Importing torch makes a million objects that stay: to look through them for garbage again
    # and again takes a tenth of a short command's time.
    gc.set_threshold(100_000, 50, 100)
    signal.signal(signal.SIGTERM, _terminate)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows its code
            stream.reconfigure(errors="backslashreplace")
    app()

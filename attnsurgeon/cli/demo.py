"""`attnsurgeon demo`: the whole path on a small trained network, with nothing to download."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnsurgeon.cli.shell import say, say_json, tell

EXAMPLES = """\b
Examples:
  attnsurgeon demo
  attnsurgeon demo my-folder --json
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("demo", short_help="See it all on a small trained network.", epilog=EXAMPLES)(demo)


def demo(
    folder: Annotated[
        Path | None, typer.Argument(help="A new folder; attnsurgeon-demo by default.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Insert CBAM into a network trained on handwritten digits; train, export, run and time it.

    The files stay in the folder.
    """
    from attnsurgeon.demo import run_demo
    from attnsurgeon.report.demo import show_demo

    done = run_demo(folder, tell)
    say_json(done.to_json()) if as_json else say(show_demo(done))

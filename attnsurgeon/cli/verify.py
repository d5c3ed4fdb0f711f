"""`attnsurgeon verify`: hold a file to its promises again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from attnsurgeon.cli.hosts import OwnHost
from attnsurgeon.cli.shell import say, say_json, tell

EXAMPLES = """\b
Examples:
  attnsurgeon verify resnet50_se.safetensors
  attnsurgeon verify resnet50_se.safetensors --json
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("verify", short_help="Hold a file to its promises again.", epilog=EXAMPLES)(verify)


def verify(
    file: Annotated[Path, typer.Argument(help="A file of attnsurgeon insert.")],
    host: OwnHost = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Check a file against its recipe: tensor hashes, identity with closed gates, live gates.

    Exit 3 if one of them is broken.
    """
    from attnsurgeon.inspection import inspect_file
    from attnsurgeon.report.inspection import show_inspection

    tell(f"checking {file}")
    found = inspect_file(file, host)
    say_json(found.to_json()) if as_json else say(show_inspection(found))

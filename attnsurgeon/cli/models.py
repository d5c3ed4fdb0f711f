"""`attnsurgeon models`: the names that can be operated on."""

from __future__ import annotations

from typing import Annotated

import typer

from attnsurgeon.cli.shell import say, say_json

EXAMPLES = """\b
Examples:
  attnsurgeon models
  attnsurgeon models 'resne*' --json
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("models", short_help="Show the networks there are.", epilog=EXAMPLES)(models)


def models(
    pattern: Annotated[str, typer.Argument(help="A shell pattern, or a part of a name.")] = "*",
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Show the names of networks, their parameters, input size and weights."""
    from attnsurgeon.report.models import models_to_json, show_models

    entries = models_to_json(pattern)
    say_json(entries) if as_json else say(show_models(entries))

"""`attnsurgeon blocks`: the attention there is, with its options."""

from __future__ import annotations

from typing import Annotated

import typer

from attnsurgeon.cli.shell import say, say_json, tell

EXAMPLES = """\b
Examples:
  attnsurgeon blocks
  attnsurgeon blocks --json
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    app.command("blocks", short_help="Show the attention there is.", epilog=EXAMPLES)(blocks)


def blocks(
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Show every attention block: paper, formula, parameters, layouts, placements, options.

    Installed packages may announce more; every layer of timm is there as timm:NAME, and a class
    of your own as path/to/file.py:Class.
    """
    from attnsurgeon.report.blocks import blocks_to_json, show_blocks

    entries = blocks_to_json(tell)
    say_json(entries) if as_json else say(show_blocks(entries))

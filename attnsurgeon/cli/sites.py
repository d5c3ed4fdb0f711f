"""`attnsurgeon sites`: where attention can go in a network."""

from __future__ import annotations

from typing import Annotated

import typer

from attnsurgeon.cli.hosts import Inputs, ModelArguments, OwnHost, is_shape, read_arguments
from attnsurgeon.cli.shell import is_assignment, list_command, say, say_json, tell

EXAMPLES = """\b
Examples:
  attnsurgeon sites resnet50
  attnsurgeon sites resnet50_se.safetensors --json
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    app.command(
        "sites",
        cls=list_command(1, input=is_shape, model_arg=is_assignment),
        short_help="Show where attention can go.",
        epilog=EXAMPLES,
    )(sites)


def sites(
    model: Annotated[
        str, typer.Argument(help="A name, your own FILE.py:FACTORY, or a file of attnsurgeon.")
    ],
    model_arg: ModelArguments = None,
    input_: Inputs = None,
    host: OwnHost = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Show what one forward pass finds: residual blocks, merges, plain blocks, activations.

    Each comes with its kind, layout, measured shape, placements and the attention it can take.
    """
    from attnsurgeon.opening import watch
    from attnsurgeon.report.sites import show_sites, site_to_json

    tell(f"watching {model}")
    found = watch(model, read_arguments(model_arg), input_ or (), host)
    say_json([site_to_json(s) for s in found]) if as_json else say(show_sites(model, found))

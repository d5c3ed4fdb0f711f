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
    """Show the residual blocks that one forward pass finds, with their measured shapes."""
    from attnsurgeon.job import open_model
    from attnsurgeon.report.sites import show_sites, site_to_json
    from attnsurgeon.sites import find_sites

    tell(f"watching {model}")
    arguments = read_arguments(model_arg)
    network = open_model(model, weights="none", arguments=arguments, inputs=input_ or (), host=host)
    found = find_sites(network)
    say_json([site_to_json(s) for s in found]) if as_json else say(show_sites(model, found))

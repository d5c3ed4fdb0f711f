"""`attnsurgeon sites`: where attention can go in a network."""

from __future__ import annotations

from typing import Annotated

import typer

from attnsurgeon.cli.shell import is_assignment, list_command, read_assignments, say, say_json, tell

EXAMPLES = """\b
Examples:
  attnsurgeon sites resnet50
  attnsurgeon sites resnet50_se.safetensors --json
"""


def add_to(app: typer.Typer) -> None:
    """Enter the command."""
    app.command(
        "sites",
        cls=list_command(1, model_arg=is_assignment),
        short_help="Show where attention can go.",
        epilog=EXAMPLES,
    )(sites)


def sites(
    model: Annotated[
        str, typer.Argument(help="A torchvision name, `digits`, or a file of attnsurgeon.")
    ],
    model_arg: Annotated[
        list[str] | None, typer.Option(help="Arguments of the network's builder, as key=value.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON list.")] = False,
) -> None:
    """Show what one forward pass finds: residual blocks, merges, plain blocks, activations.

    Each comes with its kind, layout, measured shape, placements and the attention it can take.
    """
    from attnsurgeon.cli.insert import literals
    from attnsurgeon.job import watch
    from attnsurgeon.report.sites import show_sites, site_to_json

    tell(f"watching {model}")
    arguments = literals(read_assignments(model_arg or (), "--model-arg"))
    found = watch(model, arguments)
    say_json([site_to_json(s) for s in found]) if as_json else say(show_sites(model, found))

"""The networks there are as a table and as JSON: what they do, and what can be put into them."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType

from attnsurgeon.errors import PatternUnmatched, nearest
from attnsurgeon.host import host_names
from attnsurgeon.report.table import new_table
from attnsurgeon.survey import Row, row_of, weight_names


def models_to_json(pattern: str) -> list[dict[str, Any]]:
    """Return task, parameters, input, sites, fitting blocks and weights of the matching networks.

    Raises:
        PatternUnmatched: no name matches.
    """
    names = host_names()
    wild = pattern if any(c in pattern for c in "*?[") else f"*{pattern}*"
    chosen = fnmatch.filter(names, wild)
    if not chosen:
        raise PatternUnmatched(
            f"{pattern!r} matches none of the {len(names)} models{nearest(pattern, names)}"
        )
    return [_describe(row_of(name)) for name in chosen]


def _describe(row: Row) -> dict[str, Any]:
    return {
        "name": row.name,
        "task": row.task,
        "parameters": row.parameters,
        "input": row.input,
        "input_size": _image_size(row.input),
        "sites": dict(row.sites),
        "blocks": row.fitting(),
        "attended": row.attended,
        "weights": weight_names(row.name),
    }


def _image_size(told: str) -> list[int] | None:
    """Return height and width of one image; None where there is none or more than one size."""
    sides = told.split(" x ")[-2:]
    return [int(side) for side in sides] if all(side.isdecimal() for side in sides) else None


def show_models(entries: Sequence[dict[str, Any]]) -> RenderableType:
    """Return one row per network."""
    table = new_table(f"{len(entries)} models")
    table.add_column("model", overflow="fold")
    table.add_column("task")
    table.add_column("parameters", justify="right")
    table.add_column("input")
    table.add_column("sites")
    table.add_column("blocks")
    table.add_column("weights")
    for entry in entries:
        table.add_row(
            entry["name"],
            entry["task"],
            f"{entry['parameters']:,}",
            entry["input"],
            tell_sites(entry["sites"]),
            ", ".join(entry["blocks"]),
            ", ".join(entry["weights"]),
        )
    return table


def tell_sites(sites: dict[str, int]) -> str:
    """Return the kinds of sites with their numbers in words."""
    return ", ".join(f"{count} {kind}" for kind, count in sites.items())

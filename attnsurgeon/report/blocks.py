"""The attention blocks as a table and as JSON."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import RenderableType

from attnsurgeon import blocks
from attnsurgeon.blocks.block import Place
from attnsurgeon.blocks.own import announced
from attnsurgeon.errors import first_line
from attnsurgeon.gate import forms_of
from attnsurgeon.report.table import new_table

WIDTH = 256
"""Channels at which the parameters of a block are shown."""


def blocks_to_json(notice: Callable[[str], None] = lambda text: None) -> list[dict[str, Any]]:
    """Return what each block is: paper, formula, parameters at 256 channels, options.

    Those that installed packages announce come last; one that cannot be shown is told of by
    `notice`, so that a broken package does not hide the others.
    """
    entries = [_describe(name) for name in blocks.names()]
    for name, point in sorted(announced().items()):
        if name in blocks.names():
            notice(f"skipped {name} of {point.value}: there is a block of that name")
            continue
        try:
            entries.append(_describe(name))
        except Exception as error:  # of another's package: it may be anything
            notice(f"skipped {name} of {point.value}: {first_line(error)}")
    return entries


def _describe(name: str) -> dict[str, Any]:
    block = blocks.get(name)
    defaults = inspect.signature(block).parameters
    built = block.build(Place(WIDTH))
    gates = sum(p.numel() for n, p in built.named_parameters() if n.endswith("openness"))
    options = {option: defaults[option].default for option in blocks.option_types(name)}
    return {
        "name": name,
        "title": block.title or block.__name__,
        "paper": block.paper,
        "formula": block.formula,
        "parameters": sum(p.numel() for p in built.parameters()) - gates,
        "gates": gates,
        "layouts": list(block.layouts),
        "placements": list(block.placements),
        "forms": forms_of(built),
        "options": {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()},
    }


def show_blocks(entries: Sequence[dict[str, Any]]) -> RenderableType:
    """Return one row per block."""
    table = new_table(f"attention blocks, parameters at C = {WIDTH}")
    table.add_column("block", min_width=22)  # of the longest word of a title
    table.add_column("paper", no_wrap=True)
    table.add_column("parameters", justify="right")
    table.add_column("formula")
    table.add_column("layouts")
    table.add_column("placements")
    table.add_column("options", no_wrap=True)
    for entry in entries:
        table.add_row(
            f"{entry['name']}\n{entry['title']}",
            entry["paper"],
            f"{entry['parameters']:,}",
            entry["formula"],
            " ".join(entry["layouts"]),
            " ".join(entry["placements"]),
            "\n".join(f"{k}={_short(v)}" for k, v in entry["options"].items()),
        )
    return table


def _short(value: Any) -> str:
    if isinstance(value, list):
        return ",".join(value)
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)

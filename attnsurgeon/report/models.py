"""The names of hosts as a table and as JSON, from torchvision's own registry."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

from rich.console import RenderableType
from torchvision.models import get_model_weights

from attnsurgeon import digits
from attnsurgeon.errors import PatternUnmatched, nearest
from attnsurgeon.host import DIGITS, host_names
from attnsurgeon.report.table import new_table


def models_to_json(pattern: str) -> list[dict[str, Any]]:
    """Return name, parameters, input size and weights of the matching hosts.

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
    return [_describe(name) for name in chosen]


def _describe(name: str) -> dict[str, Any]:
    if name == DIGITS:
        card = digits.read_card()
        weights = digits.read_weights().values()
        counted = sum(t.numel() for t in weights if t.is_floating_point())
        return {
            "name": name,
            "parameters": counted,
            "input_size": list(card.input_size),
            "weights": ["DEFAULT"],
        }
    known = list(get_model_weights(name))
    crop = getattr(known[0].transforms(), "crop_size", None) if known else None
    side = crop[0] if isinstance(crop, list | tuple) else crop
    return {
        "name": name,
        "parameters": known[0].meta["num_params"] if known else None,
        "input_size": [side, side] if side else None,
        "weights": [weight.name for weight in known],
    }


def show_models(entries: Sequence[dict[str, Any]]) -> RenderableType:
    """Return one row per host."""
    table = new_table(f"{len(entries)} models")
    table.add_column("model")
    table.add_column("parameters", justify="right")
    table.add_column("input", justify="right")
    table.add_column("weights")
    for entry in entries:
        size = entry["input_size"]
        table.add_row(
            entry["name"],
            f"{entry['parameters']:,}" if entry["parameters"] else "",
            f"{size[0]} x {size[1]}" if size else "",
            ", ".join(entry["weights"]),
        )
    return table

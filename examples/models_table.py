"""Print the README's table of networks, from what was observed of each of them."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

from torchvision.models import get_model_builder

from attnsurgeon.host import DIGITS
from attnsurgeon.report.models import models_to_json


def markdown_table() -> str:
    """Return one row per family of networks with the same task, kinds of sites and blocks."""
    families: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for entry in models_to_json("*"):
        if entry["name"] != DIGITS:
            families[_family(entry)].append(entry)
    lines = ["| networks | task | sites | of which with attention of their own | blocks that fit |"]
    lines.append("|---|---|---|---|---|")
    lines += [_row(entries) for _, entries in sorted(families.items())]
    return "\n".join(lines)


def _family(entry: dict[str, Any]) -> tuple[str, ...]:
    folder = get_model_builder(entry["name"]).__module__.removeprefix("torchvision.models.")
    return (entry["task"], folder, " ".join(sorted(entry["sites"])), " ".join(entry["blocks"]))


def _row(entries: list[dict[str, Any]]) -> str:
    names = ", ".join(f"`{entry['name']}`" for entry in entries)
    kinds = sorted({kind for entry in entries for kind in entry["sites"]}, reverse=True)
    sites = ", ".join(f"{_range([e['sites'][kind] for e in entries])} {kind}" for kind in kinds)
    attended = _range([entry["attended"] for entry in entries])
    told = "all" if len(entries[0]["blocks"]) == _most() else ", ".join(entries[0]["blocks"])
    return f"| {names} | {entries[0]['task']} | {sites} | {attended} | {told} |"


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    return str(low) if low == high else f"{low} to {high}"


def _most() -> int:
    from attnsurgeon import blocks

    return len(blocks.names())


if __name__ == "__main__":
    print(markdown_table())

"""The sites of a network as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from attnsurgeon.report.table import new_table
from attnsurgeon.sites import PLACEMENTS, Site


def site_to_json(site: Site) -> dict[str, Any]:
    """Return plain values; `refused` says why a placement is not there."""
    return {
        "path": site.path,
        "kind": site.kind,
        "layout": site.layout,
        "channels": site.channels,
        "shape": list(site.shape),
        "stage": site.stage,
        "placements": list(site.placements),
        "blocks": list(site.blocks),
        "refused": dict(site.refused),
    }


def show_sites(model: str, sites: Sequence[Site]) -> RenderableType:
    """Return a table of sites, and below it why some lack a placement."""
    table = new_table(f"{len(sites)} sites in {model}")
    table.add_column("stage", justify="right")
    table.add_column("site")
    table.add_column("layout")
    table.add_column("shape", justify="right")
    table.add_column("placements")
    table.add_column("blocks")
    for site in sites:
        everything = site.placements == PLACEMENTS
        table.add_row(
            str(site.stage),
            site.path,
            site.layout,
            "x".join(str(n) for n in site.shape),
            "all" if everything else ", ".join(site.placements) or "none",
            ", ".join(site.blocks) or f"none serves {site.layout}",
        )
    return Group(table, *(Text(line) for line in _reasons(sites)))


def _reasons(sites: Sequence[Site]) -> list[str]:
    """Return each reason once, with how many sites it holds for."""
    counts: dict[tuple[str, str], int] = {}
    for site in sites:
        for placement, reason in site.refused.items():
            counts[placement, reason] = counts.get((placement, reason), 0) + 1
    return [
        f"no {placement} at {count} sites: {reason}"
        for (placement, reason), count in counts.items()
    ]

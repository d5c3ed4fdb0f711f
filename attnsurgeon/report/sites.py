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
        "attention": list(site.attention),
        "also": list(site.also),
        "refused": dict(site.refused),
    }


def show_sites(model: str, sites: Sequence[Site]) -> RenderableType:
    """Return a table of sites, and below it why some lack a placement."""
    table = new_table(f"{len(sites)} sites in {model}")
    table.add_column("stage", justify="right")
    table.add_column("site", overflow="fold")
    table.add_column("kind")
    table.add_column("layout")
    table.add_column("shape", justify="right")
    table.add_column("placements")
    table.add_column("blocks")
    for site in sites:
        everything = site.placements == PLACEMENTS
        table.add_row(
            str(site.stage),
            site.path,
            site.kind,
            site.layout,
            "x".join(str(n) for n in site.shape),
            "all" if everything else ", ".join(site.placements) or "none",
            ", ".join(site.blocks) or f"none serves {site.layout}",
        )
    return Group(table, *(Text(line) for line in (*_notes(sites), *_reasons(sites))))


def _notes(sites: Sequence[Site]) -> list[str]:
    """Return what is worth knowing before the choice: other kinds, attention already there."""
    lines = []
    attended = [site for site in sites if site.attention]
    if attended:
        lines.append(
            f"{len(attended)} sites have attention of their own, the first {attended[0].path}: "
            f"{attended[0].attention[0]}"
        )
    shared = [site for site in sites if site.also]
    lines += [f"{site.path} is also reached as {', '.join(site.also)}" for site in shared]
    if any(site.kind == "plain" for site in sites):
        lines.append(
            "plain: a block of the same class without a shortcut; chosen by --kind or name"
        )
    return lines


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

"""A bench report as tables."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from attnsurgeon.bench import Report
from attnsurgeon.report.figures import (
    count,
    mebibytes,
    milliseconds,
    percent,
    supported,
    throughput,
)
from attnsurgeon.report.table import new_table
from attnsurgeon.report.wording import (
    ceilings_in_words,
    comparison_in_words,
    doubts_of_runs,
    job_in_words,
    ratio_in_words,
    sums_in_words,
    uncounted_in_words,
)

MOST_OPERATORS = 12
"""Rows of a profile that are shown; the JSON has all."""


def show_report(report: Report) -> RenderableType:
    """Return the runs, the ratios, and whatever else was measured."""
    data = report.to_json()
    parts: list[RenderableType] = [_runs(data), _costs(data)]
    parts += [_profile(profile) for profile in data["profiles"]]
    parts += [_sites(costs) for costs in data["sites"]]
    return Group(*parts, *(Text(line) for line in _lines(data)))


def _lines(data: Mapping[str, Any]) -> Iterator[str]:
    for found in data["comparisons"]:
        yield comparison_in_words(found)
        yield from (f"  doubt: {doubt}" for doubt in found["doubts"])
    for what, doubt in doubts_of_runs(data):
        yield f"doubt: {what}: {doubt}"
    for failure in data["failures"]:
        yield f"failed: {failure['reason']}"
    yield from uncounted_in_words(data["runs"])
    yield from ceilings_in_words(data["environment"]["ceilings"])
    yield from (f"note: {note}" for note in data["environment"]["notes"])


def _runs(data: Mapping[str, Any]) -> RenderableType:
    table = new_table("time per run, gates open")
    for heading in ("target", "engine", "precision"):
        table.add_column(heading)
    has_device = any(run["peak_device_bytes"] is not None for run in data["runs"])
    figures = ["batch", "median ms", "p5", "p90", "p95", "p99", "images/s", "variation", "host MiB"]
    for heading in (*figures, *(["GPU MiB"] if has_device else [])):
        table.add_column(heading, justify="right")
    for run in data["runs"]:
        table.add_row(
            run["target"],
            run["engine"],
            run["precision"] + (", training" if run["train"] else ""),
            str(run["batch"]),
            *(milliseconds(run, f"{key}_ms") for key in ("median", "p5", "p90", "p95", "p99")),
            throughput(run),
            percent(run["variation"]),
            mebibytes(run["peak_host_bytes"]),
            *([mebibytes(run["peak_device_bytes"])] if has_device else []),
        )
    return table


def _costs(data: Mapping[str, Any]) -> RenderableType:
    table = new_table("cost on paper, and how far from the machine's limits")
    for heading in ("target", "engine"):
        table.add_column(heading)
    for heading in ("batch", "parameters", "multiply-adds", "file MiB", "load s", "first run ms",
                    "of memory", "of arithmetic"):  # fmt: skip
        table.add_column(heading, justify="right")
    for run in data["runs"]:
        table.add_row(
            run["target"],
            run["engine"],
            str(run["batch"]),
            count(run["parameters"]),
            count(run["macs"]),
            mebibytes(run["file_bytes"]),
            supported(run["load_s"] or 0.0, None),
            supported(run["first_run_ms"] or 0.0, None),
            percent(run["bandwidth_share"]),
            percent(run["arithmetic_share"]),
        )
    return table


def _profile(profile: Mapping[str, Any]) -> RenderableType:
    table = new_table(f"operators of {profile['target']}, {job_in_words(profile)}")
    table.add_column("operator")
    for heading in ("calls", "ms", "share"):
        table.add_column(heading, justify="right")
    rows = profile["operators"]
    for row in rows[:MOST_OPERATORS]:
        table.add_row(
            row["name"], str(row["calls"]), supported(row["ms"], None), percent(row["share"])
        )
    if len(rows) > MOST_OPERATORS:
        rest = rows[MOST_OPERATORS:]
        share = sum(row["share"] for row in rest)
        table.add_row(f"{len(rest)} more", "", "", percent(share))
    return table


def _sites(costs: Mapping[str, Any]) -> RenderableType:
    table = new_table(f"cost of each site of {costs['target']}, {job_in_words(costs)}")
    table.add_column("site", overflow="fold")
    for heading in ("placement", "block", "features"):
        table.add_column(heading)
    for heading in ("alone in", "alone out"):
        table.add_column(heading)
    for site in costs["sites"]:
        table.add_row(
            site["path"],
            site["placement"],
            site["block"],
            "x".join(map(str, site["shape"])),
            *(ratio_in_words(site[key]) for key in ("alone_in", "alone_out")),
        )
    together, added = sums_in_words(costs)
    table.add_row("sum of all", "", "", "", added, f"all together: {together}")
    return table

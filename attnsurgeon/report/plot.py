"""Results as a picture, by matplotlib: ratios with their intervals, and the cost of each site."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attnsurgeon.errors import MissingPackage
from attnsurgeon.report.wording import job_in_words, short_names

COLOURS = {"in": "#0b66c3", "out": "#b3361b"}


def check_matplotlib() -> None:
    """Refuse to draw without matplotlib.

    Raises:
        MissingPackage: it is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise MissingPackage(
            "a picture needs matplotlib: pip install 'attnsurgeon[plot]', or give -o results.html"
        )


def draw_plot(results: Mapping[str, Any], path: Path, form: str) -> None:
    """Write a picture of the results as png or svg."""
    from matplotlib.figure import Figure  # not pyplot: no window, no state of the caller's

    panels = [_draw_ratios if results["comparisons"] else _draw_medians]
    drawings: list[tuple[Any, Any]] = [(panels[0], results)]
    drawings += [(_draw_sites, costs) for costs in results["sites"]]
    rows = [len(results["comparisons"]) or len(results["runs"])]
    rows += [len(costs["sites"]) for costs in results["sites"]]
    figure = Figure(figsize=(9, sum(1.2 + 0.45 * count for count in rows)), layout="constrained")
    axes = figure.subplots(len(drawings), 1, squeeze=False, height_ratios=rows)[:, 0]
    for axis, (draw, data) in zip(axes, drawings, strict=True):
        draw(axis, data)
    environment = results["environment"]
    where = environment["gpu"] or environment["cpu"]
    figure.suptitle(f"{where}, threads: {environment['threads']}, torch {environment['torch']}")
    figure.savefig(path, format=form, dpi=150)


def _draw_ratios(axis: Any, results: Mapping[str, Any]) -> None:
    found = results["comparisons"]
    names = short_names(results)
    labels = [f"{names[c['target']]}\n{job_in_words(c)}" for c in found]
    _draw_intervals(axis, labels, found, "in", 0.0)
    axis.set_xlabel(f"time over {names[found[0]['baseline']]}, %")


def _draw_medians(axis: Any, results: Mapping[str, Any]) -> None:
    runs = results["runs"]
    names = short_names(results)
    labels = [f"{names[run['target']]}\n{job_in_words(run)}" for run in runs]
    axis.barh(range(len(runs)), [run["median_ms"] for run in runs], color=COLOURS["in"])
    axis.set_yticks(range(len(runs)), labels)
    axis.invert_yaxis()
    axis.set_xlabel("median, ms")


def _draw_sites(axis: Any, costs: Mapping[str, Any]) -> None:
    sites = costs["sites"]
    labels = [f"{site['path']} ({'×'.join(map(str, site['shape']))})" for site in sites]
    _draw_intervals(axis, labels, [site["alone_in"] for site in sites], "in", -0.12)
    _draw_intervals(axis, labels, [site["alone_out"] for site in sites], "out", 0.12)
    axis.legend()
    # From the right edge over the labels: a long name would not fit above the axes alone.
    axis.set_title(
        f"{Path(costs['target']).name}\n{job_in_words(costs)}", loc="right", fontsize="medium"
    )
    axis.set_xlabel("cost of the site, %")


def _draw_intervals(
    axis: Any, labels: Sequence[str], found: Sequence[Mapping[str, Any]], kind: str, shift: float
) -> None:
    middles = [100 * (ratio["ratio"] - 1) for ratio in found]
    ends = [[100 * (bound - 1) for bound in ratio["interval95"]] for ratio in found]
    errors = [
        [max(0.0, m - e[0]) for m, e in zip(middles, ends, strict=True)],
        [max(0.0, e[1] - m) for m, e in zip(middles, ends, strict=True)],
    ]
    places = [i + shift for i in range(len(found))]
    axis.errorbar(
        middles, places, xerr=errors, fmt="o", capsize=3, color=COLOURS[kind], label=f"alone {kind}"
    )
    axis.set_yticks(range(len(labels)), labels)
    axis.set_ylim(len(labels) - 0.5, -0.5)
    axis.axvline(0, color="#8a94a3", linestyle="--", linewidth=1)

"""Sum up the runs: means along the steps with intervals, and differences seed by seed."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from scipy.stats import t

from examples.study.arms import Arm
from examples.study.run import MEASURED

LEVEL = 0.95
CONTROL = "only rescales, "
"""Beginning of the names of the arms whose attention is the same for every image."""


def interval(values: Sequence[float]) -> list[float]:
    """Return the mean and how far its interval reaches to either side, by Student's t."""
    mean = statistics.fmean(values)
    if len(values) < 2:
        return [mean, math.inf]
    half = t.ppf((1 + LEVEL) / 2, len(values) - 1) * statistics.stdev(values)
    return [mean, half / math.sqrt(len(values))]


def summarise(runs: Sequence[dict[str, Any]], arms: Sequence[Arm]) -> dict[str, Any]:
    """Return plain values: of each arm the accuracy along the steps, and paired differences.

    `against_plain` and `against_control` are of the end, seed by seed; the control is the better
    one at the end, on average, of those that only rescale.
    """
    curves: dict[str, dict[int, list[float]]] = {}
    for found in runs:
        curves.setdefault(found["arm"], {})[found["seed"]] = found["accuracy"]
    controls = [name for name in curves if name.startswith(CONTROL)]
    control = max(controls, key=lambda n: _mean_end(curves[n]), default=None)
    return {
        "steps": list(MEASURED),
        "seeds": len(curves["plain"]),
        "level": LEVEL,
        "control": control,
        "arms": [
            {
                "arm": arm.name,
                "half": arm.half,
                "accuracy": [
                    interval([curve[i] for curve in curves[arm.name].values()])
                    for i in range(len(MEASURED))
                ],
                "against_plain": _paired(curves[arm.name], curves["plain"]),
                "against_control": control and _paired(curves[arm.name], curves[control]),
            }
            for arm in arms
            if arm.name in curves
        ],
        "runs": sorted(runs, key=lambda found: (found["arm"], found["seed"])),
    }


def _mean_end(curve: dict[int, list[float]]) -> float:
    return statistics.fmean(values[-1] for values in curve.values())


def _paired(own: dict[int, list[float]], other: dict[int, list[float]]) -> list[float]:
    return interval([own[seed][-1] - other[seed][-1] for seed in own if seed in other])


def text(results: dict[str, Any]) -> str:
    """Return what a README says of the results: the first half, and the second folded away."""
    best = f'the control is "{results["control"]}"' if results["control"] else "no control"
    told = f"{results['seeds']} seeds; ± is a {100 * results['level']:.0f} % interval; {best}"
    return (
        f"{told}. In bold what its interval tells apart from 0.\n\n{table(results, 1)}\n"
        "<details><summary>How the gate should open: forms, starts, rates, schedules</summary>\n\n"
        f"{table(results, 2)}\n</details>\n"
    )


def table(results: dict[str, Any], half: int) -> str:
    """Return a table of Markdown, in percent and points."""
    lines = [
        "| arm | start, % | end, % | against plain | against the control |",
        "|---|---|---|---|---|",
    ]
    for row in (row for row in results["arms"] if row["half"] == half):
        start, end = row["accuracy"][0], row["accuracy"][-1]
        lines.append(
            f"| {row['arm']} | {100 * start[0]:.1f} | {100 * end[0]:.1f} ± {100 * end[1]:.1f} "
            f"| {_points(row['against_plain'])} | {_points(row['against_control'])} |"
        )
    return "\n".join(lines) + "\n"


def _points(difference: list[float] | None) -> str:
    """Return a difference in points, in bold where its interval leaves 0 out."""
    if difference is None or difference == [0.0, 0.0]:
        return "–"
    mean, half = (100 * number for number in difference)
    text = f"{mean:+.1f} ± {half:.1f}"
    return f"**{text}**" if abs(mean) > half else text

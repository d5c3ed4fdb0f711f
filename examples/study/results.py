"""Sum up the runs: means along the steps with intervals, and differences seed by seed."""

# mypy: disable-error-code="import-untyped"

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from scipy.stats import t

from examples.study.arms import Arm
from examples.study.run import MEASURED

LEVEL = 0.95
PLAIN, REST = "against_plain", "against_control"
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
                    interval(list(read)) for read in zip(*curves[arm.name].values(), strict=True)
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
        f"{table(results, 2)}\n</details>\n\n{findings(results)}"
    )


def findings(results: dict[str, Any]) -> str:
    """Return in words which differences the intervals tell apart, as a list of Markdown."""
    rows = [row for row in results["arms"] if row["arm"] != "plain"]
    starts = {row["arm"]: 100 * row["accuracy"][0][0] for row in results["arms"]}
    bare = [start for name, start in starts.items() if name.endswith("without gates")]
    gated = [starts[row["arm"]] for row in rows if not row["arm"].endswith("without gates")]
    lines = [
        f"Ended above plain fine-tuning by more than the interval: {_told(rows, PLAIN, 1)}.",
        f"Ended below it by more than the interval: {_told(rows, PLAIN, -1)}.",
    ]
    if results["control"]:
        lines.append(f"Above the control that only rescales: {_told(rows, REST, 1)}.")
    if bare and gated:
        lines.append(
            f"The plain network starts at {starts['plain']:.1f} %, those with gates at "
            f"{_range(gated)} %, those without at {_range(bare)} %."
        )
    if results.get("varies"):
        lines.append(
            f"From image to image the maps of `{results['shown']}` differ by "
            f"{_range([100 * number for number in results['varies']])} % of their size."
        )
    chance = (1 - results["level"]) * len(rows)
    lines.append(
        f"Of {len(rows)} differences at {100 * results['level']:.0f} %, {chance:.1f} are expected "
        "to be told apart by chance alone."
    )
    return "".join(f"- {line}\n" for line in lines)


def apart(row: dict[str, Any], against: str, sign: int) -> bool:
    """Tell whether an arm's difference has this sign, and its interval leaves 0 out."""
    mean, half = row[against]
    return bool(sign * mean > half)


def _told(rows: Iterable[dict[str, Any]], against: str, sign: int) -> str:
    found = [f"{row['arm']} ({_points(row[against])})" for row in rows if apart(row, against, sign)]
    return "; ".join(found).replace("**", "") or "none"


def _range(values: Sequence[float]) -> str:
    low, high = (f"{bound:.1f}" for bound in (min(values), max(values)))
    return low if low == high else f"{low} to {high}"


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

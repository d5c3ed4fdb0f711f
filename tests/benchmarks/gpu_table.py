"""The README's table of what gpu.py measured, and whether the goal was reached."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from attnsurgeon.bench.interval import Estimate, verdict

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- gpu -->\n", "<!-- end of gpu -->\n"
HALF_OF_TIMM, OVER_LEAST = 0.5, 1.5
"""The goal of SE under torch.compile: of timm's overhead, and of what moving the bytes costs."""


def table_of(results: dict[str, Any]) -> str:
    """Return the table of the README."""
    return "\n".join(_table(results)) + "\n"


def _table(results: dict[str, Any]) -> Iterator[str]:
    yield f"Measured on {results['machine']}, {results['torch']}; time over the plain network:\n"
    yield "| network | block | run | ours | timm | of the least | unchanged, alive |"
    yield "|---|---|---|--:|--:|--:|---|"
    for entry in results["entries"]:
        if "skipped" in entry:
            continue
        checks = entry["checks"]
        held = all(check["exact"] and not check["dead"] for check in checks)
        for row in entry["rows"]:
            ours, least = row["ours"]["ratio"] - 1, row["least_ratio"]
            share = f"{ours / (least - 1):.2f} ×" if least else ""
            yield (
                f"| {entry['model']} | {entry['block']} | {row['engine']}, {row['precision']}, "
                f"batch {row['batch']} | {_in_words(row['ours'])} | {_in_words(row['timm'])} | "
                f"{share} | {'yes' if held else 'NO'} |"
            )
    yield ""
    yield from _goal(results)


def _in_words(found: dict[str, Any] | None) -> str:
    return "" if found is None else verdict(Estimate(found["ratio"], *found["interval95"]))


def _goal(results: dict[str, Any]) -> Iterator[str]:
    """Say in how many runs SE under torch.compile is as cheap as it is meant to be."""
    rows = [
        row
        for entry in results["entries"]
        if entry["block"] == "se" and "skipped" not in entry
        for row in entry["rows"]
        if row["engine"].startswith("compile") and row["timm"] and row["least_ratio"]
    ]
    if not rows:
        return
    ours = [row["ours"]["ratio"] - 1 for row in rows]
    timm = [HALF_OF_TIMM * (row["timm"]["ratio"] - 1) for row in rows]
    least = [OVER_LEAST * (row["least_ratio"] - 1) for row in rows]
    halves = sum(one <= most for one, most in zip(ours, timm, strict=True))
    near = sum(one <= most for one, most in zip(ours, least, strict=True))
    yield (
        f"SE under torch.compile costs at most half of timm's in {halves} of {len(rows)} runs, and "
        f"at most {OVER_LEAST} times what its passes over memory must cost in {near}."
    )


def write_readme(results: dict[str, Any], readme: Path) -> None:
    """Put the table between its marks in the README."""
    before, _, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    readme.write_text(f"{before}{BEGIN}\n{table_of(results)}\n{END}{after}", encoding="utf-8")

"""Results as files: the suffix says which form."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from attnsurgeon.errors import UnknownName
from attnsurgeon.outputs import atomic_output, check_output
from attnsurgeon.report.figures import mebibytes, milliseconds, throughput
from attnsurgeon.report.page import as_html
from attnsurgeon.report.plot import check_matplotlib, draw_plot
from attnsurgeon.report.wording import (
    ceilings_in_words,
    comparison_in_words,
    doubts_of_runs,
    job_in_words,
    ratio_in_words,
    sums_in_words,
)

Results = Mapping[str, Any]


def check_results(path: Path, *, force: bool = False) -> None:
    """Refuse an output that could not be written when the measuring is over.

    Raises:
        UnknownName: a suffix that stands for no form of results.
        MissingPackage: a picture without matplotlib.
        OutputRefused: see check_output.
    """
    suffix = path.suffix.lower()
    if suffix not in (*_TEXTS, *PICTURES):
        raise UnknownName("form of results", suffix or str(path), (*_TEXTS, *PICTURES))
    if suffix in PICTURES:
        check_matplotlib()
    check_output(path, force=force)


def write_results(results: Results, path: Path, *, force: bool = False) -> None:
    """Write results in the form that the suffix names, whole or not at all.

    Raises:
        OutputRefused: the file cannot be written.
    """
    suffix = path.suffix.lower()
    with atomic_output(path, force=force) as part:
        if suffix in PICTURES:
            draw_plot(results, part, suffix.removeprefix("."))
        else:
            part.write_text(_TEXTS[suffix](results), encoding="utf-8", newline="")


def as_json(results: Results) -> str:
    """Return all of it."""
    return json.dumps(results, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def as_csv(results: Results) -> str:
    """Return a row for each run, with its ratio; lists of samples and doubts are left to JSON."""
    page = io.StringIO()
    left_out = ("samples_ms", "median95_ms", "uncounted", "doubts")
    rows = []
    for run, found in _with_ratios(results):
        low, high = found["interval95"] if found else (None, None)
        row = {key: value for key, value in run.items() if key not in left_out}
        row["ratio"] = found["ratio"] if found else None
        rows.append({**row, "ratio_low": low, "ratio_high": high, "doubts": len(run["doubts"])})
    if rows:
        writer = csv.DictWriter(page, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return page.getvalue()


def _with_ratios(results: Results) -> Iterator[tuple[Mapping[str, Any], Any]]:
    """Yield each run with its comparison; the baselines have none.

    They are told by their order, since one file may be compared with itself.
    """
    runs, ratios = results["runs"], iter(results["comparisons"])
    jobs = len(runs) - len(results["comparisons"])
    for number, run in enumerate(runs):
        is_baseline = number % (len(runs) // jobs) == 0
        yield run, None if is_baseline else next(ratios)


def as_markdown(results: Results) -> str:
    """Return the tables for a README or a pull request."""
    return "\n".join(_markdown(results)) + "\n"


def _markdown(results: Results) -> Iterator[str]:
    environment = results["environment"]
    yield "| target | run | median ms | p95 | images/s | host MiB |"
    yield "|---|---|--:|--:|--:|--:|"
    for run in results["runs"]:
        yield _row(
            f"`{run['target']}`", job_in_words(run), milliseconds(run, "median_ms"),
            milliseconds(run, "p95_ms"), throughput(run), mebibytes(run["peak_host_bytes"]),
        )  # fmt: skip
    yield ""
    for found in results["comparisons"]:
        yield f"- {comparison_in_words(found)}"
        yield from (f"  - doubt: {doubt}" for doubt in found["doubts"])
    yield from (f"- doubt: {what}: {doubt}" for what, doubt in doubts_of_runs(results))
    for failure in results["failures"]:
        yield f"- failed: {failure['reason']}"
    yield from (f"- note: {note}" for note in environment["notes"])
    if results["interrupted"]:
        yield "- interrupted, or ended by an error: the rest was not measured"
    for costs in results["sites"]:
        yield ""
        yield f"| site of `{costs['target']}`, {job_in_words(costs)} | features | in | out |"
        yield "|---|---|---|---|"
        for site in costs["sites"]:
            features = "×".join(map(str, site["shape"]))
            ratios = (ratio_in_words(site[key]) for key in ("alone_in", "alone_out"))
            yield _row(f"`{site['path']}`", features, *ratios)
        together, added = sums_in_words(costs)
        yield _row("sum of all", "", added, f"all together: {together}")
    yield ""
    where = environment["gpu"] or environment["cpu"]
    yield f"{where}, threads: {environment['threads']}, torch {environment['torch']};"
    yield from ceilings_in_words(environment["ceilings"])
    yield ""
    yield f"    {environment['command']}"


def _row(*cells: str) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


_TEXTS: dict[str, Callable[[Results], str]] = {
    ".json": as_json,
    ".csv": as_csv,
    ".md": as_markdown,
    ".html": as_html,
}
PICTURES = (".png", ".svg")

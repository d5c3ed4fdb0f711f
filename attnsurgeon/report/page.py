"""Results as one page of HTML: no script, nothing fetched, readable on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

from attnsurgeon.report.charts import draw_distributions, draw_ratios, draw_sites
from attnsurgeon.report.figures import (
    count,
    mebibytes,
    milliseconds,
    percent,
    supported,
    throughput,
)
from attnsurgeon.report.style import STYLE
from attnsurgeon.report.wording import (
    ceilings_in_words,
    doubts_of_runs,
    job_in_words,
    short_names,
    uncounted_in_words,
)

Results = Mapping[str, Any]
FIGURES = ("target", "run", "median ms", "p5", "p90", "p95", "p99", "images/s", "variation",
           "host MiB", "GPU MiB", "file MiB", "load s", "first run ms", "of memory",
           "of arithmetic", "parameters", "multiply-adds")  # fmt: skip


def as_html(results: Results) -> str:
    """Return the page."""
    return "\n".join(_page(results)) + "\n"


def _page(results: Results) -> Iterator[str]:
    environment, names = results["environment"], short_names(results)
    where = environment["gpu"] or environment["cpu"]
    yield '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">'
    yield '<meta name="viewport" content="width=device-width, initial-scale=1">'
    yield f"<title>attnsurgeon bench on {escape(where)}</title>\n<style>{STYLE}</style>"
    yield "</head>\n<body>\n<main>\n<h1>What the attention costs</h1>"
    yield f'<p class="where">{escape(where)}, {escape(environment["device"])}, '
    yield f"threads: {environment['threads']}, torch {escape(str(environment['torch']))}</p>"
    yield f"<pre>{escape(environment['command'])}</pre>"
    if results["interrupted"]:
        yield '<p class="doubt">Interrupted, or ended by an error: the rest was not measured.</p>'
    yield from _section("Time over the baseline", draw_ratios(results["comparisons"], names))
    yield from _section("Distributions", draw_distributions(results["runs"], names))
    for costs in results["sites"]:
        title = f"Cost along the depth of {names[costs['target']]}, {job_in_words(costs)}"
        yield from _section(title, draw_sites(costs))
    yield from _section("Figures", _figures(results["runs"], names))
    for profile in results["profiles"]:
        title = f"Operators of {names[profile['target']]}, {job_in_words(profile)}"
        yield from _section(title, _operators(profile))
    yield from _section("Doubts and notes", _doubts(results))
    yield from _section("Where it ran", _environment(environment))
    yield "</main>\n</body>\n</html>"


def _section(title: str, body: Iterator[str]) -> Iterator[str]:
    inside = list(body)
    if inside:
        yield f"<section>\n<h2>{escape(title)}</h2>"
        yield from inside
        yield "</section>"


def _table(headings: tuple[str, ...], rows: Iterator[list[str]], texts: int) -> Iterator[str]:
    """Return a table that scrolls by itself; the first columns are texts, the others figures."""
    yield '<div class="wide"><table>\n<thead><tr>'
    yield "".join(f"<th{_class(i, texts)}>{escape(name)}</th>" for i, name in enumerate(headings))
    yield "</tr></thead>\n<tbody>"
    for row in rows:
        cells = (f"<td{_class(i, texts)}>{escape(cell)}</td>" for i, cell in enumerate(row))
        yield f"<tr>{''.join(cells)}</tr>"
    yield "</tbody>\n</table></div>"


def _class(column: int, texts: int) -> str:
    return "" if column < texts else ' class="figure"'


def _figures(runs: list[Mapping[str, Any]], names: Mapping[str, str]) -> Iterator[str]:
    def row(run: Mapping[str, Any]) -> list[str]:
        times = ("median_ms", "p5_ms", "p90_ms", "p95_ms", "p99_ms")
        return [
            names[run["target"]],
            job_in_words(run),
            *(milliseconds(run, key) for key in times),
            throughput(run),
            percent(run["variation"]),
            *(mebibytes(run[key]) for key in ("peak_host_bytes", "peak_device_bytes")),
            mebibytes(run["file_bytes"]),
            *(
                "" if run[k] is None else supported(run[k], None)
                for k in ("load_s", "first_run_ms")
            ),
            percent(run["bandwidth_share"]),
            percent(run["arithmetic_share"]),
            count(run["parameters"]),
            count(run["macs"]),
        ]

    columns = [*zip(FIGURES, *(row(run) for run in runs), strict=True)]
    told = [column for column in columns if any(column[1:])]  # the CPU has no memory of a GPU
    headings, *rows = zip(*told, strict=True)
    yield from _table(tuple(headings), iter([*map(list, rows)]), texts=2)
    yield from (f"<p>{escape(line)}</p>" for line in uncounted_in_words(runs))


def _operators(profile: Mapping[str, Any]) -> Iterator[str]:
    rows = (
        [row["name"], str(row["calls"]), supported(row["ms"], None), percent(row["share"])]
        for row in profile["operators"]
    )
    yield from _table(("operator", "calls", "ms", "share"), rows, texts=1)


def _doubts(results: Results) -> Iterator[str]:
    lines = [(job_in_words(c), doubt) for c in results["comparisons"] for doubt in c["doubts"]]
    lines += doubts_of_runs(results)
    if lines or results["failures"] or results["environment"]["notes"]:
        yield "<ul>"
        for what, doubt in dict.fromkeys(lines):
            yield f'<li class="doubt">{escape(what)}: {escape(doubt)}</li>'
        for failure in results["failures"]:
            yield f'<li class="doubt">{escape(failure["reason"])}</li>'
        for note in results["environment"]["notes"]:
            yield f"<li>{escape(note)}</li>"
        yield "</ul>"


def _environment(environment: Mapping[str, Any]) -> Iterator[str]:
    left_out = ("command", "notes", "ceilings")
    facts = [(k, v) for k, v in environment.items() if k not in left_out and v is not None]
    yield "<dl>"
    for key, value in facts:
        yield f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(str(value))}</dd>"
    yield "</dl>"
    for line in ceilings_in_words(environment["ceilings"]):
        yield f"<p>{escape(line)}</p>"

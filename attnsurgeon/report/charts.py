"""The drawings of the results page: bars in HTML, so that labels keep their size on a phone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from attnsurgeon.report.wording import job_in_words, ratio_in_words, sums_in_words

Run = Mapping[str, Any]
BINS = 48
MARGIN = 0.06
"""Of an axis, free at both ends."""
COLOURS = ("var(--base)", "var(--own)", "var(--slow)", "var(--fast)")
GOLDEN_ANGLE = 137.5
"""Between the hues of further targets, so that none comes near another."""


class _Axis:
    """A scale of per cent that holds zero and every interval drawn on it."""

    def __init__(self, ratios: Sequence[Mapping[str, Any]]) -> None:
        ends: list[float] = [100 * (end - 1) for ratio in ratios for end in ratio["interval95"]]
        low, high = min(0.0, *ends), max(0.0, *ends)
        air = MARGIN * ((high - low) or 1.0)
        self.low, self.high = max(-100.0, low - air), high + air  # nothing takes less than no time

    def place(self, percent: float) -> float:
        """Return where a value stands, in per cent of the width."""
        return 100 * (percent - self.low) / (self.high - self.low)

    def drawn(self, found: Mapping[str, Any]) -> str:
        """Return the track of one ratio: its interval, its value, and zero."""
        low, high = (self.place(100 * (bound - 1)) for bound in found["interval95"])
        words = ratio_in_words(found)
        kind = "slow" if words.startswith("+") else "fast" if words.startswith("-") else "same"
        return (
            f'<div class="track" role="img" aria-label="{escape(words)}">'
            f'<div class="zero" style="left:{self.place(0):.2f}%"></div>'
            f'<div class="span {kind}" style="left:{low:.2f}%;width:{high - low:.2f}%"></div>'
            f'<div class="dot {kind}" style="left:{self.place(100 * (found["ratio"] - 1)):.2f}%">'
            "</div></div>"
        )

    def legend(self) -> str:
        """Return the ends of the axis and its zero in words."""
        ends = [f"{value:+.{0 if abs(value) >= 10 else 1}f} %" for value in (self.low, self.high)]
        return (
            '<div class="row"><div class="label"></div><div class="axis">'
            f"<span>{ends[0]}</span><span>dashed: no difference</span><span>{ends[1]}</span>"
            "</div></div>"
        )


def draw_ratios(comparisons: Sequence[Run], names: Mapping[str, str]) -> Iterator[str]:
    """Draw every ratio with its interval on one axis; `names` are those of the targets."""
    if not comparisons:
        return
    axis = _Axis(comparisons)
    for found in comparisons:
        yield _row(
            f"{names[found['target']]} against {names[found['baseline']]}",
            f"{job_in_words(found)}: {ratio_in_words(found)}",
            axis.drawn(found),
        )
    yield axis.legend()


def _row(label: str, below: str, drawing: str) -> str:
    return (
        f'<div class="row"><div class="label">{escape(label)}<small>{escape(below)}</small></div>'
        f"{drawing}</div>"
    )


def _colour(number: int) -> str:
    if number < len(COLOURS):
        return COLOURS[number]
    return f"hsl({GOLDEN_ANGLE * (number + 1) % 360:.0f} 60% 50%)"


def draw_distributions(runs: Sequence[Run], names: Mapping[str, str]) -> Iterator[str]:
    """Draw how the calls of all targets of a job are spread, on one axis for each job."""
    for job in dict.fromkeys(job_in_words(run) for run in runs):
        group = [run for run in runs if job_in_words(run) == job]
        low = min(run["p5_ms"] for run in group)
        high = max(run["p99_ms"] for run in group)
        air = MARGIN * (high - low)
        low, high = (max(0.0, low - air), high) if high > low else (0.9 * low, 1.1 * high)
        edges = np.linspace(low, high, BINS + 1)
        heights = [_density(run["samples_ms"], edges) for run in group]
        top = max(float(height.max()) for height in heights) or 1.0
        yield f"<h3>{escape(job)}</h3>"
        yield f'<svg class="plot" viewBox="0 0 {BINS} 100" preserveAspectRatio="none" role="img">'
        yield f"<title>calls of {escape(', '.join(names[run['target']] for run in group))}</title>"
        for i, height in enumerate(heights):
            yield f'<path style="fill:{_colour(i)};opacity:.55" d="{_outline(height / top)}"/>'
        yield "</svg>"
        yield f'<div class="axis"><span>{low:.3g} ms</span><span>calls</span><span>{high:.3g} ms'
        yield '</span></div><div class="legend">'
        for i, run in enumerate(group):
            name = escape(names[run["target"]])
            yield f'<span><i style="background:{_colour(i)}"></i>{name}</span>'
        yield "</div>"


def _density(samples: Sequence[float], edges: Any) -> Any:
    """Return the share of the calls in each bin; those beyond the last are not drawn."""
    return np.histogram(samples, edges)[0] / max(1, len(samples))


def _outline(heights: Any) -> str:
    """Return the path of a histogram's outline, in a box of BINS by 100."""
    steps = "".join(f"V{100 - 92 * float(h):.1f}H{i + 1}" for i, h in enumerate(heights))
    return f"M0 100{steps}V100Z"


def draw_sites(costs: Run) -> Iterator[str]:
    """Draw what each site costs alone, in the order of the network."""
    together, added = sums_in_words(costs)
    yield (
        f"<p>All sites together: {escape(together)}. The sum of each alone: {escape(added)}. "
        "Above: that site alone in the host. Below: all sites, over all without that one.</p>"
    )
    axis = _Axis([site[key] for site in costs["sites"] for key in ("alone_in", "alone_out")])
    for site in costs["sites"]:
        features = " × ".join(map(str, site["shape"]))
        tracks = "".join(axis.drawn(site[key]) for key in ("alone_in", "alone_out"))
        words = [ratio_in_words(site[key]) for key in ("alone_in", "alone_out")]
        below = f"{site['block']}, {site['placement']}, {features}; in: {words[0]}, out: {words[1]}"
        yield _row(site["path"], below, f"<div>{tracks}</div>")
    yield axis.legend()

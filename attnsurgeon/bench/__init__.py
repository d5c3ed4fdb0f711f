"""Measure what attention costs: interleaved, pair by pair, with an interval on the ratio.

targets.py, exported.py  what is timed: files, names, modules
cost.py                  what it costs on paper, and whether it can be compared
engines.py               what can run it; a new engine is one function
timing.py                who runs when, and for how long
interval.py              the ratio, how sure it is, and the verdict
"""

from __future__ import annotations

from attnsurgeon.bench.compare import compare_speed
from attnsurgeon.bench.engines import names as engine_names
from attnsurgeon.bench.results import Comparison, Report, Timing

__all__ = ["Comparison", "Report", "Timing", "compare_speed", "engine_names"]

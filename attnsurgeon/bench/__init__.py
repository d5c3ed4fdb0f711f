"""Measure what attention costs: interleaved, with an interval on the ratio.

request.py                        what is asked for
targets.py                        what is timed: files, names, modules
exported.py, packages.py          files of .onnx and TorchScript; .pt2
inputs.py, precision.py           what it is called with, in which numbers
cost.py, onnx_cost.py             what it costs on paper, and whether it can be compared
engines/                          what can run it; a new engine is one function
training.py                       a whole step of training
ready.py, memory.py, largest.py   made ready: load time, memory, the largest batch
timing.py, rounds.py, quiet.py    who runs when, for how long, and whether it has settled
ratios.py, interval.py            the ratio, how sure it is, and the verdict
ceilings.py, watch.py, doubts.py  what the machine can do, what it did meanwhile, what to doubt
per_site.py, profiling.py         where the cost sits
lineup.py, job.py, judging.py     side by side; one job; what it says
session.py, compare.py            all jobs
results.py, findings.py           what was found
schema.py, environment.py         its keys, and where it ran
regression.py                     results of two days against each other
"""

from __future__ import annotations

from attnsurgeon.bench.compare import compare_speed
from attnsurgeon.bench.engines import names as engine_names
from attnsurgeon.bench.results import Comparison, Report, Timing
from attnsurgeon.bench.session import BenchInterrupted, measured_before

__all__ = [
    "BenchInterrupted",
    "Comparison",
    "Report",
    "Timing",
    "compare_speed",
    "engine_names",
    "measured_before",
]

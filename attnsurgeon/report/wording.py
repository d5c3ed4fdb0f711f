"""Results in words, the same in every form of report."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

from attnsurgeon.bench.interval import Estimate, verdict


def short_names(results: Mapping[str, Any]) -> dict[str, str]:
    """Return target -> its name without the folder, where that still tells it from the others."""
    found = [*results["runs"], *results["comparisons"]]
    targets = {one["target"] for one in found} | {c["baseline"] for c in results["comparisons"]}
    names = {target: PurePath(target).name or target for target in targets}
    taken = Counter(names.values())
    return {target: name if taken[name] == 1 else target for target, name in names.items()}


def job_in_words(run: Mapping[str, Any]) -> str:
    """Say what ran it: `eager, batch 8, fp16, channels last`."""
    extras = [run["precision"]] if run["precision"] != "fp32" else []
    extras += ["channels last"] if run["channels_last"] else []
    extras += ["training"] if run["train"] else []
    return ", ".join([run["engine"], f"batch {run['batch']}", *extras])


def comparison_in_words(found: Mapping[str, Any]) -> str:
    """Say what a target costs over the baseline."""
    return (
        f"{found['target']} against {found['baseline']}, {job_in_words(found)}: {found['verdict']}"
    )


def ratio_in_words(found: Mapping[str, Any]) -> str:
    """Return a ratio with its interval as a verdict."""
    return verdict(Estimate(found["ratio"], *found["interval95"]))


def sums_in_words(costs: Mapping[str, Any]) -> tuple[str, str]:
    """Return what all sites cost together, and the sum of what each costs alone.

    The intervals of the sites are independent: they add up as squares do.
    """
    low, high = costs["whole95"]
    together = Estimate(1 + costs["whole"], 1 + low, 1 + high)
    down, up = 0.0, 0.0
    for site in costs["sites"]:
        ratio, (low, high) = site["alone_in"]["ratio"], site["alone_in"]["interval95"]
        down, up = math.hypot(down, ratio - low), math.hypot(up, high - ratio)
    total = 1 + costs["sum_alone_in"]
    return verdict(together), verdict(Estimate(total, total - down, total + up))


def doubts_of_runs(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (what, doubt) for every doubt, without those that its job's comparison has told."""
    told = {(job_in_words(c), doubt) for c in results["comparisons"] for doubt in c["doubts"]}
    shown = short_names(results)
    names = [(shown[run["target"]], run) for run in results["runs"]]
    names += [(f"sites of {shown[costs['target']]}", costs) for costs in results["sites"]]
    return [
        (f"{name}, {job_in_words(found)}", doubt)
        for name, found in names
        for doubt in found["doubts"]
        if (job_in_words(found), doubt) not in told
    ]


def uncounted_in_words(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say which operators are not among the multiply-adds, if any."""
    names = sorted({name for run in runs for name in run["uncounted"]})
    if names:
        yield f"not among the multiply-adds: {', '.join(names)}"


def ceilings_in_words(ceilings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say what the machine reached at most."""
    for one in ceilings:
        yield (
            f"ceilings, {one['precision']}: memory {one['bytes_per_s'] / 1e9:.3g} GB/s, "
            f"arithmetic {one['macs_per_s'] / 1e9:.3g} G multiply-adds/s"
        )

"""Results in words, the same in every form of report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from attnsurgeon.bench.interval import Estimate, verdict


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


def ceilings_in_words(ceilings: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say what the machine reached at most."""
    for one in ceilings:
        yield (
            f"ceilings, {one['precision']}: memory {one['bytes_per_s'] / 1e9:.3g} GB/s, "
            f"arithmetic {one['macs_per_s'] / 1e9:.3g} G multiply-adds/s"
        )

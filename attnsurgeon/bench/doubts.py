"""Reasons not to trust a figure, each in one sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from attnsurgeon.bench.ratios import HOW, compared
from attnsurgeon.bench.rounds import Race, is_settled
from attnsurgeon.bench.watch import Noticed

WIDEST_SPREAD = 0.15
"""Middle half of the calls over their median."""
MOST_DRIFT = 0.05
"""Between the first and the last third of the rounds."""
MOST_OTHERS = 0.25
"""Cores that others keep busy; timers and daemons need less."""
LAUNCH_BOUND = 0.9
"""Share of a block in which the host is still launching."""
TRANSFER_BOUND = 0.5
"""Of a run's time, for bringing its inputs to the device."""
VISIBLE = 1e-3
"""Smallest share of the output that opening the gates must move to tell whether it did."""


def spread_doubt(samples_ms: Sequence[float]) -> str | None:
    """Doubt calls that are far apart."""
    low, middle, high = np.percentile(samples_ms, (25, 50, 75))
    share = (high - low) / middle
    if share <= WIDEST_SPREAD:
        return None
    return f"spread: the middle half of the calls spans {100 * share:.0f} % of the median"


def drift_doubt(log_times: Sequence[float]) -> str | None:
    """Doubt a median that moved on from the first to the last third of the rounds."""
    third = max(1, len(log_times) // 3)
    change = (
        math.exp(statistics.fmean(log_times[-third:]) - statistics.fmean(log_times[:third])) - 1
    )
    if abs(change) <= MOST_DRIFT:
        return None
    return f"drift: the median moved by {100 * change:+.0f} % between the first and the last rounds"


def stability_doubt(race: Race, seconds: float) -> str | None:
    """Doubt a race that was not stable when the patience was over."""
    if is_settled(race):
        return None
    if len(race.samples_ms) > 1 and race.is_disturbed():
        return (
            "disturbed: something else held up so many calls that their middle says nothing; "
            f"{HOW[compared(race).part]}; measure again on a quiet machine"
        )
    return (
        f"not stable: the last rounds disagree with those before, after {len(race.rounds)} rounds; "
        f"give more than --seconds {seconds:g}"
    )


def machine_doubts(noticed: Noticed) -> list[str]:
    """Doubt a machine that others used, or that was slowed down."""
    doubts = []
    if noticed.other_cores is not None and noticed.other_cores > MOST_OTHERS:
        doubts.append(f"other load: others kept {noticed.other_cores:.1f} cores busy meanwhile")
    doubts += [f"throttled: the {name} was slowed down meanwhile" for name in noticed.throttled]
    return doubts


def launch_doubt(share: float | None) -> str | None:
    """Doubt device times that are really the host's."""
    if share is None or share <= LAUNCH_BOUND:
        return None
    return (
        f"enqueue-bound: the host launches for {100 * share:.0f} % of the time, so the device "
        "waits for it; try a larger --batch, or --engine cudagraphs"
    )


def transfer_doubt(transfer_ms: float | None, median_ms: float) -> str | None:
    """Doubt that the time of a run says much where bringing its inputs takes as long."""
    if transfer_ms is None or transfer_ms <= TRANSFER_BOUND * median_ms:
        return None
    return (
        f"transfer-bound: bringing the inputs to the device takes {transfer_ms:.2g} ms, which is "
        "not in the times"
    )


def finite_doubt(found: Sequence[Tensor]) -> str | None:
    """Doubt the time of a network whose output is no number: arithmetic with such can be slower."""
    if all(leaf.isfinite().all() for leaf in found):
        return None
    return "not finite: the output holds NaN or infinite values, and so may what is computed before"


def folded_doubt(
    found: Sequence[Tensor], opened: Sequence[Tensor], closed: Sequence[Tensor]
) -> str | None:
    """Doubt an engine whose output is that of closed gates: it left the attention out.

    Args:
        found: what the engine computes with open gates.
        opened: what the network computes with open gates.
        closed: what it computes with closed ones.
    """
    own, want, other = (_flat(leaves) for leaves in (found, opened, closed))
    moved = (want - other).norm()
    if not torch.isfinite(moved) or moved <= VISIBLE * want.norm():
        return None  # the gates are too faint to tell
    if (own - want).norm() <= (own - other).norm():
        return None
    return "folded away: the output is that of closed gates, so the attention was not run"


def _flat(leaves: Sequence[Tensor]) -> Tensor:
    return torch.cat([leaf.detach().cpu().double().flatten() for leaf in leaves])

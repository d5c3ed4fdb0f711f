"""An insertion as a table of sites and a summary."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from attnsurgeon.checkpoint import Fit
from attnsurgeon.insertion import Insertion
from attnsurgeon.report.table import new_table


def show_insertion(done: Insertion) -> RenderableType:
    """Return the sites with what each costs, and what was promised and held."""
    table = new_table(f"{done.block} in {done.model}, {done.placement}")
    table.add_column("site", overflow="fold")
    if len(done.steps) > 1:
        table.add_column("block")
        table.add_column("placement")
    for heading in ("channels", "feature size", "parameters", "multiply-adds"):
        table.add_column(heading, justify="right")
    for cost in done.costs:
        size = "x".join(str(n) for n in cost.cut.sizes)
        table.add_row(
            cost.cut.path,
            *((cost.cut.block, cost.cut.placement) if len(done.steps) > 1 else ()),
            f"{cost.cut.place.channels:,}",
            size,
            f"{cost.parameters:,}",
            f"{cost.macs:,}",
        )
    return Group(table, *(Text(line) for line in summary(done)))


def summary(done: Insertion) -> list[str]:
    """Return the lines under the table."""
    counts, tensors = done.parameters, done.tensors
    share = 100 * counts["added"] / max(1, counts["before"])
    lines = [
        f"parameters        {counts['before']:,} + {counts['added']:,} (+{share:.2f} %)"
        f" + {counts['gates']} gates = {counts['after']:,}",
        f"original tensors  {tensors['kept']}/{tensors['original']} identical,"
        f" {tensors['new']} new",
    ]
    if done.checkpoint is not None:
        lines.append(f"checkpoint        {_told(done.checkpoint, tensors['new'])}")
    if done.attended:
        lines.append(
            f"note              {len(done.attended)} of these sites have attention of their own"
        )
    if done.skipped:
        reason = next(iter(done.skipped.values()))
        count = len(done.skipped)
        told = f"{count} sites, the first" if count > 1 else "1 site"
        lines.append(f"skipped           {told}: {reason}")
    if done.verdict is not None and done.liveness is not None:
        runs = len(done.verdict.inputs)
        lines += [
            f"identity          exact: {runs} of {runs} runs bitwise equal (eval and train)",
            f"liveness          {done.liveness.live}/{done.liveness.gates} gates can learn",
            f"written           {done.output}",
        ]
        if done.liveness.lent:
            lines.append(
                "note              the network returns the same for all inputs: "
                f"{', '.join(done.liveness.lent[:3])} is all zero; train it first"
            )
    else:
        lines.append("dry run           nothing was written")
    return lines


def _told(fit: Fit, new: int) -> str:
    """Return the counts, and what the tensors were taken out of."""
    held = fit.checkpoint
    counts = f"{fit.kept} kept, {new} new, {fit.missing} missing, {fit.unexpected} unexpected"
    taken = f"; taken out of {', '.join(held.unwrapped)}" if held.unwrapped else ""
    left = f"; without {', '.join(held.dropped)}" if held.dropped else ""
    return f"{counts}{taken}{left}"

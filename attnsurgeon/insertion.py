"""What an insertion did, or would do: sites, costs, counts; as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from attnsurgeon.checkpoint import Fit
from attnsurgeon.cost import multiply_adds
from attnsurgeon.export import Artifact
from attnsurgeon.liveness import Liveness
from attnsurgeon.plan import Cut, Plan
from attnsurgeon.steps import Step
from attnsurgeon.surgery import build_attention
from attnsurgeon.verify import Verdict


@dataclass(frozen=True)
class CutCost:
    """What one cut adds: parameters without gates, and multiply-adds for one input."""

    cut: Cut
    parameters: int
    gates: int
    macs: int

    def to_json(self) -> dict[str, Any]:
        """Return plain values; a step of a plan can be made of them."""
        return {
            "path": self.cut.path,
            "block": self.cut.block,
            "placement": self.cut.placement,
            "options": dict(self.cut.options),
            "seed": self.cut.seed,
            "gate": self.cut.gate,
            "channels": self.cut.place.channels,
            "shape": list(self.cut.shape),
            "parameters": self.parameters,
            "macs": self.macs,
        }


@dataclass(frozen=True)
class Insertion:
    """What was done, or in a dry run would be.

    `block` and `placement` join those of several steps by a plus.
    """

    model: str
    output: str | None
    steps: tuple[Step, ...]
    costs: tuple[CutCost, ...]
    parameters: Mapping[str, int]
    tensors: Mapping[str, int]
    skipped: Mapping[str, str]
    attended: tuple[str, ...] = ()
    checkpoint: Fit | None = None
    verdict: Verdict | None = None
    liveness: Liveness | None = None
    artifact: Artifact | None = None

    @property
    def block(self) -> str:
        """The names of the blocks, each once."""
        return "+".join(dict.fromkeys(step.block for step in self.steps))

    @property
    def placement(self) -> str:
        """The placements, each once."""
        return "+".join(dict.fromkeys(step.placement for step in self.steps))

    def to_json(self) -> dict[str, Any]:
        """Return plain values; `identity` and `liveness` are null in a dry run."""
        return {
            "model": self.model,
            "output": self.output,
            "block": self.block,
            "placement": self.placement,
            "plan": [step.to_json() for step in self.steps],
            "sites": [cost.to_json() for cost in self.costs],
            "skipped": dict(self.skipped),
            "attended": list(self.attended),
            "parameters": dict(self.parameters),
            "tensors": dict(self.tensors),
            "checkpoint": self.checkpoint and self.checkpoint.to_json(self.tensors["new"]),
            "identity": self.verdict
            and {"exact": self.verdict.exact, "inputs": list(self.verdict.inputs)},
            "liveness": self.liveness
            and {"gates": self.liveness.gates, "live": self.liveness.live},
            "lent": list(self.liveness.lent) if self.liveness else [],
        }


def cut_costs(model: nn.Module, plan: Plan) -> tuple[CutCost, ...]:
    """Return what each cut of a plan would add."""
    costs = []
    for cut in plan.cuts:
        attention = build_attention(model, cut)
        total = sum(p.numel() for p in attention.parameters())
        gates = sum(p.numel() for n, p in attention.named_parameters() if n.endswith("openness"))
        macs = multiply_adds(attention, _reads(cut, next(attention.parameters()).dtype))
        costs.append(CutCost(cut, total - gates, gates, macs))
    return tuple(costs)


def _reads(cut: Cut, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Return stand-ins for what the attention of a cut reads, channels second."""
    sizes = cut.sizes
    out = torch.empty(1, cut.place.channels, *sizes, dtype=dtype, device="meta")
    if cut.place.in_channels is None:
        return (out,)
    read = (size * step for size, step in zip(sizes, cut.place.stride, strict=True))
    return out.new_empty(1, cut.place.in_channels, *read), out


def count_new(model: nn.Module, plan: Plan) -> int:
    """Return how many tensors the attention of a plan has."""
    return sum(len(build_attention(model, cut).state_dict()) for cut in plan.cuts)

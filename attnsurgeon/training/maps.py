"""The maps that attention computes, caught where they come to their gates, by no change of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.blocks.global_context import ContextPool
from attnsurgeon.borrow import borrowed_buffers, borrowed_modes
from attnsurgeon.gate import Gate
from attnsurgeon.plan import Cut
from attnsurgeon.surgery import cuts_of
from attnsurgeon.training.stripping import Ungated

CHANNEL, SPATIAL, BRANCH, ADDED, CONTEXT = "channel", "spatial", "branch", "added", "context"


@dataclass(frozen=True)
class AttentionMap:
    """What one attention computed for a batch.

    Attributes:
        cut: where it stands.
        name: of its gate inside the block, or of the layer that makes the mask.
        kind: channel, added (N, C); spatial, context (N, H, W); branch (N, M, C), which sums to 1
            over M. A context is a softmax over its positions.
        values: before the gate mixes it, on the CPU in float32.
    """

    cut: Cut
    name: str
    kind: str
    values: Tensor


MASKS: dict[type[nn.Module], tuple[str, Callable[[Tensor], Tensor]]] = {
    ContextPool: ("mask", lambda logits: logits.flatten(2).softmax(2).view_as(logits)),
}
"""Modules with a mask over positions that no gate sees: the child that returns it, its meaning."""


def watch_maps(model: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, list[AttentionMap]]:
    """Return the output of a model in eval mode and every map on the way, in order of insertion.

    The model is given back as it was.
    """
    caught: dict[tuple[str, str], list[tuple[str, Tensor]]] = {}
    with ExitStack() as lent, torch.no_grad():
        lent.enter_context(borrowed_modes(model))
        lent.enter_context(borrowed_buffers(model))
        for cut in cuts_of(model):
            for name, module in model.get_submodule(cut.child).named_modules():
                seen = caught.setdefault((cut.child, name), [])
                if isinstance(module, Gate | Ungated):
                    lent.enter_context(_overheard(module, seen))
                elif type(module) in MASKS:
                    lent.enter_context(_masked(module, seen))
        output = model.eval()(*inputs)
    maps = [
        _as_map(cut, name, seen)
        for cut in cuts_of(model)
        for (child, name), seen in caught.items()
        if child == cut.child and seen
    ]
    return output, maps


@contextmanager
def _overheard(gate: nn.Module, seen: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Note what comes to a gate, to be multiplied or to be added."""
    admit: Callable[[Tensor, Tensor], Tensor] = gate.admit  # type: ignore[assignment]

    def overhear(term: Tensor, features: Tensor) -> Tensor:
        seen.append((ADDED, term))
        return admit(term, features)

    hook = gate.register_forward_pre_hook(lambda _, args: seen.append((CHANNEL, args[0])))
    gate.__dict__["admit"] = overhear  # `admit` is no forward, so that no hook hears it
    try:
        yield
    finally:
        hook.remove()
        del gate.__dict__["admit"]


@contextmanager
def _masked(module: nn.Module, seen: list[tuple[str, Tensor]]) -> Iterator[None]:
    child, meaning = MASKS[type(module)]
    hook = module.get_submodule(child).register_forward_hook(
        lambda _, args, logits: seen.append((CONTEXT, meaning(logits)))
    )
    try:
        yield
    finally:
        hook.remove()


def _as_map(cut: Cut, name: str, seen: list[tuple[str, Tensor]]) -> AttentionMap:
    kind, first = seen[0]
    parts = [part.detach().float().cpu() for _, part in seen]
    if len(parts) > 1:  # a gate that is asked once for each branch
        return AttentionMap(cut, name, BRANCH, torch.stack([p.flatten(1) for p in parts], 1))
    values = parts[0]
    if kind == CONTEXT or (first.shape[1] == 1 and kind == CHANNEL):
        return AttentionMap(cut, name, CONTEXT if kind == CONTEXT else SPATIAL, values[:, 0])
    if values[0, 0].numel() > 1:  # one weight for each element: show it over the positions
        return AttentionMap(cut, name, SPATIAL, values.mean(1))
    return AttentionMap(cut, name, kind, values.flatten(1))

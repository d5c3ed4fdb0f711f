"""The maps that attention computes, caught where they come to their gates, by no change of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon.blocks.global_context import ContextPool
from attnsurgeon.blocks.non_local import NonLocal
from attnsurgeon.borrow import borrowed_buffers, borrowed_modes
from attnsurgeon.gate import Gate, LayerGate
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


@dataclass(frozen=True)
class Mask:
    """How a module's mask over positions is made of what some of its children return."""

    children: tuple[str, ...]
    make: Callable[[Any, list[Tensor]], Tensor]


def _context(pool: Any, returned: list[Tensor]) -> Tensor:
    return returned[0].flatten(2).softmax(2).view_as(returned[0])


def _mean_likeness(block: Any, returned: list[Tensor]) -> Tensor:
    """Return how much each position is attended to, mean over the positions that ask."""
    queries, keys = returned[0].flatten(2).float(), block.pool(returned[1]).float()
    likeness = torch.matmul(queries.transpose(1, 2), keys.flatten(2))
    if block.has_softmax:
        likeness = likeness.softmax(2)
    return likeness.mean(1).view_as(keys[:, 0]).unsqueeze(1)


MASKS: dict[type[nn.Module], Mask] = {
    ContextPool: Mask(("mask",), _context),
    NonLocal: Mask(("theta", "phi"), _mean_likeness),
}
"""Modules with a mask over positions that comes to no gate."""


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
                if isinstance(module, Gate | LayerGate | Ungated):
                    lent.enter_context(_overheard(module, seen))
                elif type(module) in MASKS:
                    lent.enter_context(_masked(module, MASKS[type(module)], seen))
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

    def note(kind: str, values: Tensor) -> None:
        if values.ndim > 2:  # scSE also asks its gates for 1 - g alone, with one number
            seen.append((kind, values))

    def overhear(term: Tensor, features: Tensor) -> Tensor:
        note(ADDED, term)
        return admit(term, features)

    hook = gate.register_forward_pre_hook(lambda _, args: note(CHANNEL, args[0]))
    gate.__dict__["admit"] = overhear  # `admit` is no forward, so that no hook hears it
    try:
        yield
    finally:
        hook.remove()
        del gate.__dict__["admit"]


@contextmanager
def _masked(module: nn.Module, mask: Mask, seen: list[tuple[str, Tensor]]) -> Iterator[None]:
    """Note the mask of a module when it has run."""
    returned: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
        return lambda _, args, output: returned.update({name: output})

    def finish(_: nn.Module, args: Any, output: Any) -> None:
        seen.append((CONTEXT, mask.make(module, [returned[name] for name in mask.children])))

    hooks = [module.get_submodule(name).register_forward_hook(keep(name)) for name in mask.children]
    hooks.append(module.register_forward_hook(finish))
    try:
        yield
    finally:
        for hook in hooks:
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

"""The second promise: every gate can learn, and opening it changes what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.borrow import (
    borrowed_buffers,
    borrowed_modes,
    borrowed_numerics,
    borrowed_randomness,
    borrowed_values,
)
from attnsurgeon.errors import HostUnusable
from attnsurgeon.gate import gates_by_path
from attnsurgeon.probes import Inputs, arguments_in, small_resizes, unfolded


@dataclass(frozen=True)
class Liveness:
    """How many gates there are, and which of them cannot learn or change nothing when opened.

    `lent` names all-zero weights of a host that returns the same whatever it is given, as with an
    untrained head: nothing behind them can be heard, so they held random numbers meanwhile.
    """

    gates: int
    dead: tuple[str, ...] = ()
    lent: tuple[str, ...] = ()

    @property
    def live(self) -> int:
        """How many gates have a finite non-zero gradient and change the output when opened."""
        return self.gates - len(self.dead)


def check_liveness(model: nn.Module, inputs: Inputs) -> Liveness:
    """Ask of every gate a finite non-zero gradient, and that opening it alone changes an output.

    Eval mode is tried first, then train mode (a random network can be all but silent in one of
    them). The model is given back as it was; `.grad` of no parameter is touched.

    Raises:
        HostUnusable: attention does not run once for each run of its module.
    """
    gates = {path: list(held.values()) for path, held in gates_by_path(model).items()}
    dead = _dead_gates(model, gates, inputs)
    silent = _silent_weights(model) if dead else {}
    if not silent or not _is_constant(model, inputs):
        return Liveness(len(gates), dead)
    with borrowed_values(list(silent.values())), borrowed_randomness(0):
        for weight in silent.values():
            nn.init.normal_(weight, std=0.1)
        dead = _dead_gates(model, gates, inputs)
    return Liveness(len(gates), dead, tuple(silent))


def _silent_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the matrices and kernels of the host that are all zero, by name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not parameter.any()
    }


def _is_constant(model: nn.Module, inputs: Inputs) -> bool:
    """Tell whether a network returns the same for other numbers, so that nothing in it counts."""
    other = tree_map_only(Tensor, lambda t: 0.5 * t if t.is_floating_point() else t, inputs)
    with borrowed_modes(model):
        model.eval()
        pairs = zip(_leaves(model, inputs), _leaves(model, other), strict=True)
        return all(same(a, b) for a, b in pairs)


Gates = dict[str, list[nn.Parameter]]
"""Path of each gate -> what opens it: its number, or the weights of the last layer."""


def _dead_gates(model: nn.Module, gates: Gates, inputs: Inputs) -> tuple[str, ...]:
    """Return the gates without a usable gradient, or without effect, in eval and in train mode."""
    dead = set(gates)
    moved: set[str] = set()
    with (
        borrowed_modes(model),
        borrowed_buffers(model),
        borrowed_values(_tensors(gates)),
        small_resizes(model),
    ):
        for mode in _modes(model, inputs):
            model.train(mode == "train")
            given = arguments_in(mode, model, inputs)
            if not dead and moved == set(gates):
                break
            with _called_once_each(model):
                dead -= _with_gradient(model, {name: gates[name] for name in sorted(dead)}, given)
            moved |= _with_effect(model, {n: gates[n] for n in gates if n not in moved}, given)
    return tuple(n for n in gates if n in dead or n not in moved)


def _tensors(gates: Gates) -> list[nn.Parameter]:
    return [tensor for held in gates.values() for tensor in held]


def _modes(model: nn.Module, inputs: Inputs) -> tuple[str, str]:
    """Return eval and train mode, for detectors the other way round: losses hear every gate."""
    return (
        ("eval", "train") if arguments_in("train", model, inputs) is inputs else ("train", "eval")
    )


def _with_gradient(model: nn.Module, gates: Gates, inputs: Inputs) -> set[str]:
    """Return the names of the gates that one backward pass reaches with a usable gradient."""
    if not gates:
        return set()
    for gate in _tensors(gates):
        gate.requires_grad_(True)
    with torch.enable_grad(), borrowed_randomness(0):
        loss = _weighted_sum(model(*inputs))
        if not loss.requires_grad:  # as where a detector found nothing
            return set()
        # Only the gates are asked for: no gradient of the host's weights is computed or kept.
        try:
            found = torch.autograd.grad(loss, _tensors(gates), allow_unused=True)
        except RuntimeError as error:
            if "inplace" not in str(error):
                raise
            raise HostUnusable(
                f"{type(model).__name__} changes in place what attention has read, so that it "
                "cannot be trained; choose other sites by --at, or write x = x + y for x += y"
            ) from error
    owners = [name for name, held in gates.items() for _ in held]
    return {name for name, gradient in zip(owners, found, strict=True) if _is_usable(gradient)} - {
        name for name, gradient in zip(owners, found, strict=True) if not _is_finite(gradient)
    }


def _is_finite(gradient: Tensor | None) -> bool:
    return gradient is None or bool(gradient.isfinite().all())


def _is_usable(gradient: Tensor | None) -> bool:
    return gradient is not None and bool(gradient.any())


def _weighted_sum(output: Any) -> Tensor:
    """Return a scalar that hears every output; a plain sum is blind to what a softmax does."""
    leaves = [
        t for t in tree_leaves(unfolded(output)) if isinstance(t, Tensor) and t.is_floating_point()
    ]
    if not leaves:
        return torch.zeros(())
    weights = (torch.randn(leaf.shape).to(leaf.device, leaf.dtype) for leaf in leaves)
    return torch.stack(
        [(leaf * weight).sum().float() for leaf, weight in zip(leaves, weights, strict=True)]
    ).sum()


def _with_effect(model: nn.Module, gates: Gates, inputs: Inputs) -> set[str]:
    """Return the names of the gates that change an output when opened alone."""
    if not gates:
        return set()
    closed = _leaves(model, inputs)
    moved = set()
    for name, held in gates.items():
        with borrowed_values(held), torch.no_grad():
            for tensor in held:
                tensor.add_(1)
            opened = _leaves(model, inputs)
        if any(not same(a, b) for a, b in zip(closed, opened, strict=True)):
            moved.add(name)
    return moved


def _leaves(model: nn.Module, inputs: Inputs) -> list[Any]:
    with torch.no_grad(), borrowed_buffers(model), borrowed_randomness(0), borrowed_numerics():
        return list(tree_leaves(unfolded(model(*inputs))))


def same(a: Any, b: Any) -> bool:
    """Tell whether two leaves of outputs are equal: tensors by torch.equal, of one dtype."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


@contextmanager
def _called_once_each(model: nn.Module) -> Iterator[None]:
    """Count calls: a module that walks all its children would run what was added to it twice."""
    calls: Counter[str] = Counter()
    attention = {p: m for p, m in model.named_modules() if isinstance(m, AttentionBlock)}
    watched = {**attention, **{_parent(p): model.get_submodule(_parent(p)) for p in attention}}

    def count(path: str) -> Any:
        return lambda *_: calls.update([path])

    handles = [module.register_forward_hook(count(path)) for path, module in watched.items()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for path in attention:
        if calls[path] != calls[_parent(path)]:
            raise HostUnusable(
                f"{_parent(path)} runs its attention {calls[path]} times in "
                f"{calls[_parent(path)]} runs: its forward calls all of its children; choose "
                "another site with --at"
            )


def _parent(path: str) -> str:
    return path.rpartition(".")[0]

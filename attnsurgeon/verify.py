"""The promises: every output is what it was, bit for bit, and every gate can learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from attnsurgeon.borrow import (
    borrowed_buffers,
    borrowed_modes,
    borrowed_numerics,
    borrowed_randomness,
    borrowed_values,
)
from attnsurgeon.errors import HostUnusable, IdentityBroken, first_line
from attnsurgeon.gate import named_gates
from attnsurgeon.observe import runs_on, why_it_fails

Inputs = tuple[Any, ...]
MODES = ("eval", "train")


@dataclass(frozen=True)
class Verdict:
    """Whether two networks computed the same, and where not.

    Attributes:
        exact: every output and, after the train pass, every buffer was equal by torch.equal.
        inputs: what was compared: {"mode", "shapes"} for each run.
        differences: one sentence for each thing that was not equal.
    """

    exact: bool
    inputs: tuple[dict[str, Any], ...]
    differences: tuple[str, ...] = ()


@dataclass(frozen=True)
class Liveness:
    """How many gates there are, and which of them cannot learn or change nothing when opened."""

    gates: int
    dead: tuple[str, ...] = ()

    @property
    def live(self) -> int:
        """How many gates have a finite non-zero gradient and change the output when opened."""
        return self.gates - len(self.dead)


@dataclass(frozen=True)
class Run:
    """What one pass returned: the leaves of its outputs, their structure, the buffers after it."""

    mode: str
    inputs: Inputs
    leaves: tuple[Any, ...]
    structure: str
    buffers: dict[str, Tensor]


def record(model: nn.Module, inputs: Sequence[Inputs]) -> list[Run]:
    """Run a model on each input in eval and train mode; the model is left as it was.

    Raises:
        HostUnusable: the model itself fails, or returns NaN, which nothing can be compared with.
    """
    runs = []
    for mode in MODES:
        for batch in inputs:
            try:
                run = _run(model, batch, mode)
            except Exception as error:  # it is the user's network: any failure is its own
                raise HostUnusable(
                    f"{type(model).__name__} fails on {_shapes(batch)} in {mode} mode: "
                    f"{first_line(error)}; give a network and weights that run"
                ) from error
            if any(isinstance(leaf, Tensor) and leaf.isnan().any() for leaf in run.leaves):
                raise HostUnusable(
                    f"{type(model).__name__} itself returns NaN in {mode} mode, which nothing can "
                    "be compared with; give weights without NaN"
                )
            runs.append(run)
    return runs


def _shapes(inputs: Any) -> list[list[int]]:
    return [list(leaf.shape) for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]


def _run(model: nn.Module, inputs: Inputs, mode: str) -> Run:
    with (
        torch.no_grad(),
        borrowed_modes(model),
        borrowed_buffers(model),
        borrowed_randomness(0),  # the same dropout for both sides
        borrowed_numerics(),
    ):
        model.train(mode == "train")
        leaves, structure = tree_flatten(model(*inputs))
        # A host may hand out a buffer of its own: what it held must not change under us.
        leaves = [leaf.clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        buffers = {}
        if mode == "train":
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    return Run(mode, inputs, tuple(leaves), str(structure), buffers)


def compare(before: Sequence[Run], after: nn.Module) -> Verdict:
    """Run a model on what was recorded and compare by torch.equal, structure and buffers too."""
    differences: list[str] = []
    compared: list[dict[str, Any]] = []
    for old in before:
        shapes = _shapes(old.inputs)
        compared.append({"mode": old.mode, "shapes": shapes})
        new = _run(after, old.inputs, old.mode)
        differences += [f"{old.mode} {shapes}: {text}" for text in _differences(old, new)]
    return Verdict(not differences, tuple(compared), tuple(differences))


def _differences(old: Run, new: Run) -> list[str]:
    if old.structure != new.structure:
        return ["the output has another structure"]
    found = [
        f"output {i} differs{_how_far(a, b)}"
        for i, (a, b) in enumerate(zip(old.leaves, new.leaves, strict=True))
        if not _same(a, b)
    ]
    for name, buffer in old.buffers.items():
        if name not in new.buffers:
            found.append(f"buffer {name} is gone")
        elif not torch.equal(buffer, new.buffers[name]):
            found.append(f"buffer {name} differs{_how_far(buffer, new.buffers[name])}")
    return found


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    return type(a) is type(b) and bool(a == b)


def _how_far(a: Any, b: Any) -> str:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return ""
    if a.isnan().any():
        return ": it holds NaN before the operation already"
    return f" by up to {(a.double() - b.double()).abs().max().item():.3g}"


def verify_unchanged(before: nn.Module, after: nn.Module, inputs: Any) -> Verdict:
    """Compare two models on the same inputs in eval and in train mode, by torch.equal.

    Both are given back as they were: modes, running statistics, random state.

    Args:
        before: the untouched network.
        after: the operated one.
        inputs: a tensor, a tuple of positional inputs, or a list of either; several sizes and
            batch sizes see more.
    """
    batches = inputs if isinstance(inputs, list) else [inputs]
    return compare(record(before, [_as_tuple(batch) for batch in batches]), after)


def _as_tuple(batch: Any) -> Inputs:
    return tuple(batch) if isinstance(batch, tuple) else (batch,)


def probe_inputs(model: nn.Module, example: Inputs) -> list[Inputs]:
    """Return random inputs like the example: two batch sizes, and two resolutions where it can.

    A single image batch is made small (64 px) where the network runs at that size, since
    exactness does not depend on it and time does.

    Raises:
        HostUnusable: the network does not run on the example's size either.
    """
    like = [leaf for leaf in tree_leaves(example) if isinstance(leaf, Tensor)]
    if len(example) != 1 or len(like) != 1 or like[0].ndim != 4:
        return [_random(example, 2), _random(example, 3)]
    image = like[0]
    height, width = image.shape[2:]
    small = (min(height, 64), min(width, 64))
    sizes = [small, (height, width)]
    base = next((size for size in sizes if _runs(model, image, size)), None)
    if base is None:
        error = why_it_fails(model, _batch(image, (height, width)), train=True)
        reason = f": {first_line(error)}" if error else ""
        raise HostUnusable(
            f"{type(model).__name__} fails on batches of {height}x{width} images{reason}; "
            "give a network and weights that run"
        )
    others = [(base[0] + 32, base[1]), (height + 32, width), base]
    other = next(size for size in others if _runs(model, image, size))
    return [_random((_resized(image, base),), 2), _random((_resized(image, other),), 3)]


def _runs(model: nn.Module, image: Tensor, size: tuple[int, int]) -> bool:
    return runs_on(model, _batch(image, size), train=True)


def _batch(image: Tensor, size: tuple[int, int]) -> Inputs:
    return (_resized(image, size).expand(2, -1, -1, -1),)


def _resized(image: Tensor, size: tuple[int, int]) -> Tensor:
    return image.new_zeros(1, image.shape[1], *size)


def _random(example: Inputs, batch: int) -> Inputs:
    """Return normal random tensors of the example's shapes, with another batch size."""
    with borrowed_randomness(batch):
        return tuple(
            torch.randn(batch, *part.shape[1:]).to(part.device, part.dtype)
            if isinstance(part, Tensor) and part.is_floating_point()
            else part
            for part in example
        )


def check_liveness(model: nn.Module, inputs: Inputs) -> Liveness:
    """Ask of every gate a finite non-zero gradient, and that opening it alone changes an output.

    Eval mode is tried first, then train mode (a random network can be all but silent in one of
    them). The model is given back as it was; `.grad` of no parameter is touched.
    """
    gates = named_gates(model)
    dead = set(gates)
    moved: set[str] = set()
    with borrowed_modes(model), borrowed_buffers(model), borrowed_values(list(gates.values())):
        for mode in MODES:
            model.train(mode == "train")
            dead -= _with_gradient(model, {name: gates[name] for name in sorted(dead)}, inputs)
            moved |= _with_effect(model, {n: gates[n] for n in gates if n not in moved}, inputs)
    return Liveness(len(gates), tuple(n for n in gates if n in dead or n not in moved))


def _with_gradient(model: nn.Module, gates: dict[str, nn.Parameter], inputs: Inputs) -> set[str]:
    """Return the names of the gates that one backward pass reaches with a usable gradient."""
    if not gates:
        return set()
    for gate in gates.values():
        gate.requires_grad_(True)
    with torch.enable_grad(), borrowed_randomness(0):
        loss = _weighted_sum(model(*inputs))
        # Only the gates are asked for: no gradient of the host's weights is computed or kept.
        found = torch.autograd.grad(loss, list(gates.values()), allow_unused=True)
    return {
        name
        for name, gradient in zip(gates, found, strict=True)
        if gradient is not None and bool(gradient.isfinite().all()) and bool(gradient.any())
    }


def _weighted_sum(output: Any) -> Tensor:
    """Return a scalar that hears every output; a plain sum is blind to what a softmax does."""
    leaves = [t for t in tree_leaves(output) if isinstance(t, Tensor) and t.is_floating_point()]
    weights = (torch.randn(leaf.shape).to(leaf.device, leaf.dtype) for leaf in leaves)
    return torch.stack(
        [(leaf * weight).sum().float() for leaf, weight in zip(leaves, weights, strict=True)]
    ).sum()


def _with_effect(model: nn.Module, gates: dict[str, nn.Parameter], inputs: Inputs) -> set[str]:
    """Return the names of the gates that change an output when opened alone."""
    if not gates:
        return set()
    closed = _leaves(model, inputs)
    moved = set()
    for name, gate in gates.items():
        with borrowed_values([gate]), torch.no_grad():
            gate.add_(1)
            opened = _leaves(model, inputs)
        if any(not _same(a, b) for a, b in zip(closed, opened, strict=True)):
            moved.add(name)
    return moved


def _leaves(model: nn.Module, inputs: Inputs) -> list[Any]:
    with torch.no_grad(), borrowed_buffers(model), borrowed_randomness(0), borrowed_numerics():
        return list(tree_leaves(model(*inputs)))


def keep_promises(
    model: nn.Module, operate: Callable[[], None], inputs: Sequence[Inputs]
) -> tuple[Verdict, Liveness]:
    """Record the model, operate on it in place, and hold it to both promises.

    Raises:
        IdentityBroken: an output or buffer changed, or a gate is dead. The model is then as the
            operation left it.
    """
    before = record(model, inputs)
    operate()
    verdict = compare(before, model)
    if not verdict.exact:
        raise IdentityBroken(
            f"the operated network is not the same: {verdict.differences[0]}"
            f" ({len(verdict.differences)} differences); nothing was kept"
        )
    liveness = check_liveness(model, inputs[0])
    if liveness.dead:
        raise IdentityBroken(
            f"{len(liveness.dead)} of {liveness.gates} gates cannot learn, the first "
            f"{liveness.dead[0]}: no gradient reaches it or opening it changes no output (is the "
            "branch it scales all zero?); nothing was kept; try --placement post"
        )
    return verdict, liveness

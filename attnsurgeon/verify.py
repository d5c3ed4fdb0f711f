"""The promises: every output is what it was, bit for bit, and every gate can learn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves

from attnsurgeon.arguments import typed
from attnsurgeon.borrow import (
    borrowed_buffers,
    borrowed_modes,
    borrowed_numerics,
    borrowed_randomness,
)
from attnsurgeon.errors import BadOption, HostUnusable, IdentityBroken, first_line
from attnsurgeon.liveness import Liveness, check_liveness, same
from attnsurgeon.probes import Inputs, arguments_in, small_resizes, unfolded

MODES = ("eval", "train")
_MOST_TOLD = 8
"""Sites that one line names."""


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
            except (
                Exception,
                SystemExit,
            ) as error:  # of the user's network: any failure is its own
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
        leaves, structure = tree_flatten(unfolded(model(*arguments_in(mode, model, inputs))))
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
        if not same(a, b)
    ]
    for name, buffer in old.buffers.items():
        if name not in new.buffers:
            found.append(f"buffer {name} is gone")
        elif not torch.equal(buffer, new.buffers[name]):
            found.append(f"buffer {name} differs{_how_far(buffer, new.buffers[name])}")
    return found


def _how_far(a: Any, b: Any) -> str:
    if not isinstance(a, Tensor) or not isinstance(b, Tensor) or a.shape != b.shape:
        return ""
    if a.isnan().any():
        return ": it holds NaN before the operation already"
    return f" by up to {(a.double() - b.double()).abs().max().item():.3g}"


@typed
def verify_unchanged(before: nn.Module, after: nn.Module, inputs: Any) -> Verdict:
    """Compare two models on the same inputs in eval and in train mode, by torch.equal.

    Both are given back as they were: modes, running statistics, random state.

    Args:
        before: the untouched network.
        after: the operated one.
        inputs: a tensor, a tuple of positional inputs, or a list of either; several sizes and
            batch sizes see more.

    Raises:
        BadOption: an empty list.
        HostUnusable: the untouched network does not run on them.
    """
    batches = inputs if isinstance(inputs, list) else [inputs]
    if not batches:
        raise BadOption("verify_unchanged has nothing to compare on: give it at least one input")
    return compare(record(before, [_as_tuple(batch) for batch in batches]), after)


def _as_tuple(batch: Any) -> Inputs:
    return tuple(batch) if isinstance(batch, tuple) else (batch,)


def keep_promises(
    model: nn.Module, operate: Callable[[], None], inputs: Sequence[Inputs]
) -> tuple[Verdict, Liveness]:
    """Record the model, operate on it in place, and hold it to both promises.

    Raises:
        IdentityBroken: an output or buffer changed, or a gate is dead. The model is then as the
            operation left it.
    """
    with small_resizes(model):
        before = record(model, inputs)
        operate()
        try:
            verdict = compare(before, model)
        except (
            Exception
        ) as error:  # the host's own code met the attention, as in a walk of children
            raise IdentityBroken(
                f"the operated network fails where its host runs: {first_line(error)}; nothing was "
                "kept; choose other sites by --at or --exclude"
            ) from error
    if not verdict.exact:
        raise IdentityBroken(
            f"the operated network is not the same: {verdict.differences[0]}"
            f" ({len(verdict.differences)} differences); nothing was kept"
        )
    liveness = check_liveness(model, inputs[0])
    if liveness.dead:
        first = liveness.dead[0]
        sites = list(dict.fromkeys(_site_of(gate) for gate in liveness.dead))
        told = " ".join(map(repr, sites[:_MOST_TOLD])) + " ..." * (len(sites) > _MOST_TOLD)
        raise IdentityBroken(
            f"{len(liveness.dead)} of {liveness.gates} gates cannot learn, the first {first}: no "
            "gradient reaches it or opening it changes no output (is the branch it scales all "
            f"zero?); nothing was kept; give --exclude {told} or another --placement"
        )
    return verdict, liveness


def _site_of(gate: str) -> str:
    """Return the path of the site whose attention a gate belongs to."""
    return gate.partition(".attention_")[0]

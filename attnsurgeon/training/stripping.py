"""Take out gates that stand at 1: what remains is the published block, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Iterable

from torch import Tensor, nn

from attnsurgeon.arguments import typed
from attnsurgeon.errors import BadFile, HostUnusable
from attnsurgeon.gate import CentredGate, Gate, gate_numbers, named_gates
from attnsurgeon.noted import Noted
from attnsurgeon.surgery import cuts_of


class Ungated(Noted):
    """Stands where a gate stood at 1: lets the map through, and has no number."""

    form = "mix, stripped"

    def forward(self, attention: Tensor, features: Tensor) -> Tensor:
        """Return the map in the dtype of the features it will multiply."""
        return attention.to(features.dtype)

    def admit(self, term: Tensor, features: Tensor) -> Tensor:
        """Return the term in the dtype of the features it will be added to."""
        return term.to(features.dtype)


class UngatedTwice(Ungated):
    """Stands where a gate of the form `centred` stood at 1: lets twice the map through."""

    form = "centred, stripped"

    def forward(self, attention: Tensor, features: Tensor) -> Tensor:
        """Return twice the map in the dtype of the features it will multiply."""
        return (2 * attention).to(features.dtype)


@typed
def strip_gates(model: nn.Module) -> nn.Module:
    """Return a copy whose gates, all exactly 1, are gone: the published blocks, bitwise equal.

    Its files say so and load again. Without gates the attention cannot be closed: `verify` has
    nothing to hold such a file to, and `remove` still takes it out.

    Raises:
        HostUnusable: a gate is not at 1, or there is none; GateSchedule(anneal=...) leads there.
    """
    gates = gate_numbers(model)
    if not gates or not cuts_of(model):
        why = "its gates are its last layers, without a number" if named_gates(model) else ""
        raise HostUnusable(f"this {type(model).__name__} has no gates to strip{why and f': {why}'}")
    apart = [name for name, gate in gates.items() if not bool((gate == 1).all())]
    if apart:
        value = gates[apart[0]].flatten()[0].item()
        raise HostUnusable(
            f"{len(apart)} of {len(gates)} gates are not at 1, the first {apart[0]} ({value:.6g}); "
            "lead them there with GateSchedule(model, anneal=STEPS) before stripping"
        )
    bare = copy.deepcopy(model)
    take_gates(bare, [cut.child for cut in cuts_of(bare)])
    return bare


def take_gates(model: nn.Module, children: Iterable[str]) -> None:
    """Take the gates out of the attention at these paths, in this very model.

    Raises:
        BadFile: there is no attention of that path.
    """
    known = {cut.child for cut in cuts_of(model)}
    for child in children:
        if child not in known:
            raise BadFile(f"it has no attention {child!r} to be without gates")
        for module in model.get_submodule(child).modules():
            for name, inner in module.named_children():
                if isinstance(inner, Gate):
                    kind = UngatedTwice if isinstance(inner, CentredGate) else Ungated
                    setattr(module, name, kind().train(inner.training))


def ungated(model: nn.Module) -> tuple[str, ...]:
    """Return the paths of the attention whose gates were stripped."""
    return tuple(
        cut.child
        for cut in cuts_of(model)
        if any(isinstance(m, Ungated) for m in model.get_submodule(cut.child).modules())
    )

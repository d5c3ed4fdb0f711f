"""Leave out of an export what gates that stand at 0 or 1 make superfluous."""

from __future__ import annotations

import torch
from torch import nn

from attnsurgeon.errors import IdentityBroken
from attnsurgeon.export.inputs import Inputs
from attnsurgeon.export.proof import gate_values, run_with_gates
from attnsurgeon.gate import gate_numbers, named_gates
from attnsurgeon.surgery import cuts_of, without_cuts
from attnsurgeon.training.stripping import take_gates


def strip_decided(model: nn.Module, inputs: Inputs) -> tuple[nn.Module, str]:
    """Return a copy without the attention whose gates are all 0 and the gates that are all 1.

    What is at 0 is its own input, and what is at 1 the published block; any other value stays.
    Returned with it is what was done, in words.

    Raises:
        IdentityBroken: on these inputs the copy is not bitwise what the model is, as where 0 times
            an infinite term was added.
    """
    cuts = cuts_of(model)
    at = {value: [cut for cut in cuts if _stand_at(model, cut.child, value)] for value in (0, 1)}
    if not at[0] and not at[1]:
        return model, "no attention has all its gates at 0 or all at 1: nothing was stripped"
    bare = without_cuts(model, at[0])
    take_gates(bare, [cut.child for cut in at[1]])
    before = run_with_gates(model, gate_values(model), inputs)
    after = run_with_gates(bare, gate_values(bare), inputs)
    if len(before) != len(after) or not all(map(torch.equal, before, after)):
        raise IdentityBroken(
            f"{type(model).__name__} computes something else once it is stripped of gates at 0 and "
            "1; export it without --strip"
        )
    return bare, (
        f"stripped: of {len(cuts)} attention blocks {len(at[0])} dropped, whose gates are at 0, "
        f"and {len(at[1])} freed of gates at 1"
    )


def _stand_at(model: nn.Module, child: str, value: int) -> bool:
    """Tell whether the attention at this path has gates, and all of them are exactly there.

    Of the form `layer` there is nothing to be at 1.
    """
    attention = model.get_submodule(child)
    gates = gate_numbers(attention) if value else named_gates(attention)
    return bool(gates) and all(bool((gate == value).all()) for gate in gates.values())

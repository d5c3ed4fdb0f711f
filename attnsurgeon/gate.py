"""The gate: the only place where "unchanged" is made true.

A gate scales the attention *map*, never the features: `mix(a, g) = (1 - g) + g * a`, then one
multiplication with the features. At g = 0 the mixed map is exactly 1 whatever the (finite) map
holds, so `x * mix` is `x` bit for bit; at g = 1 it is exactly the published block. A term that
is added (`x + g * t`) is scaled by the same number: at g = 0 it adds a zero, which leaves every
value equal (only a zero's sign may change from - to +, which no comparison can tell).

The gradient with respect to g at g = 0 is `sum(dL/dy * x * (a - 1))`, in general not zero: the
gate learns at the first step, everything behind it from the second.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnsurgeon.arguments import typed

FORM = "mix"
"""Name of the form above; it stands in every recipe, so that another form can be told apart."""


class Gate(nn.Module):
    """How far attention is let in: 0 is not at all, 1 is the published block."""

    def __init__(self) -> None:
        super().__init__()
        self.openness = nn.Parameter(torch.zeros(1))  # (1,): FSDP refuses scalar parameters

    def forward(self, attention: Tensor, features: Tensor) -> Tensor:
        """Mix a multiplicative map towards 1, in the dtype of the features it will multiply."""
        # Without the cast a float32 gate would promote the whole feature map under autocast.
        return ((1 - self.openness) + self.openness * attention).to(features.dtype)

    def admit(self, term: Tensor, features: Tensor) -> Tensor:
        """Scale a term towards 0, in the dtype of the features it will be added to."""
        return (self.openness * term).to(features.dtype)


@typed
def named_gates(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return dotted path -> the learnable number of each gate, in the order of the modules."""
    return {
        f"{path}.openness" if path else "openness": module.openness
        for path, module in model.named_modules()
        if isinstance(module, Gate)
    }

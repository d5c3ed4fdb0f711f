"""SimAM (Yang et al., ICML 2021, PMLR 139:11863), equations 5 and 6: attention without parameters.

Each neuron is weighed by how far it stands out of its channel: σ(1/E), 1/E = (x - μ)² / (4(v + λ))
+ 1/2, v the variance over M - 1 of the M positions, as in the released code. A map of one
position has no variance: it counts as 0. Half precision is computed in float32, as squares of
float16 features overflow.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnsurgeon import blocks
from attnsurgeon.blocks.block import EVERYWHERE, AttentionBlock
from attnsurgeon.blocks.spatial import at_least_float32, positions
from attnsurgeon.errors import BadOption
from attnsurgeon.gate import Gate


@blocks.register("simam")
class SimpleAttention(AttentionBlock):
    """Rescale each neuron by how much it stands out. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of the feature map; it decides nothing here.
        dims: number of spatial axes.
        regularizer: λ, above 0.

    Raises:
        BadOption: a value out of range.
    """

    title = "Simple, Parameter-Free Attention"
    paper = "PMLR 139:11863"
    formula = "0"
    layouts = EVERYWHERE

    def __init__(self, channels: int, *, dims: int = 2, regularizer: float = 1e-4) -> None:
        super().__init__()
        if not 0 < regularizer < math.inf:
            raise BadOption(f"regularizer must be above 0 and finite, not {regularizer}")
        self.regularizer = regularizer
        self.positions = positions(dims)
        self.gate = Gate(is_sigmoid=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its mixed map."""
        wide = at_least_float32(x)
        # An infinite square over an infinite variance would be NaN, even behind a closed gate.
        squares = (wide - wide.mean(self.positions, keepdim=True)).square().clamp(max=3e38)
        count = x.flatten(2).shape[2]
        others = count - 1 + 1 // count  # at least 1, in arithmetic that every exporter follows
        variance = squares.sum(self.positions, keepdim=True) / others
        attention = torch.sigmoid(squares / (4 * (variance + self.regularizer)) + 0.5)
        mixed: Tensor = self.gate(attention, x)
        return x * mixed

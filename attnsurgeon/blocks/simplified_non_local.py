"""Simplified non-local block (Cao et al., ICCVW 2019, arXiv:1904.11492).

z_i = x_i + Wv Σ_j α_j x_j, α the softmax of Wk x over the positions: one attention for all
queries, and Wv taken out of the sum. Differs from the paper: Wv starts at its ordinary value,
since the gate already is the zero. Wk and Wv have biases, as the authors' code for GC has.
"""

from __future__ import annotations

from torch import Tensor

from attnsurgeon import blocks
from attnsurgeon.blocks.block import EVERYWHERE, AttentionBlock
from attnsurgeon.blocks.global_context import ContextPool
from attnsurgeon.blocks.spatial import convolution
from attnsurgeon.gate import Gate


@blocks.register("snl")
class SimplifiedNonLocal(AttentionBlock):
    """Add one attended sum of the whole map to every position. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of the feature map.
        dims: number of spatial axes.
        bias: of Wv.
    """

    title = "Simplified non-local block"
    paper = "arXiv:1904.11492"
    formula = "C² + 2C + 1"
    layouts = EVERYWHERE

    def __init__(self, channels: int, *, dims: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.pool = ContextPool(channels, dims)
        self.transform = convolution(dims, channels, channels, 1, bias=bias)
        self.gate = Gate("transform")

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the admitted share of its transformed context."""
        return x + self.gate.admit(self.transform(self.pool(x)), x)

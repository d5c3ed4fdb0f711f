"""Efficient Channel Attention (Wang et al., CVPR 2020, arXiv:1910.03151), section 3.2.

The map is σ(C1D_k(GAP(x))) (3.2.2), k the odd number nearest to (log2 C + b) / γ (3.2.3).

Differs from the released code: the convolution over the channels takes them as the first spatial
axis of a map (kernel k x 1 where theirs is k), which spares it two reshapes. The kernel is zero
beyond the first and last channel, as theirs.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from attnsurgeon import blocks
from attnsurgeon.blocks.block import EVERYWHERE, AttentionBlock
from attnsurgeon.blocks.spatial import convolution, positions
from attnsurgeon.errors import BadOption
from attnsurgeon.gate import Gate


@blocks.register("eca")
class EfficientChannelAttention(AttentionBlock):
    """Rescale each channel by a weight from k neighbours. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of the feature map.
        dims: number of spatial axes.
        kernel_size: k, odd; by default the odd number that section 3.2.3 gives for C.
        gamma: γ of section 3.2.3.
        beta: b of section 3.2.3.

    Raises:
        BadOption: a value out of range.
    """

    title = "Efficient Channel Attention"
    paper = "arXiv:1910.03151"
    formula = "k, k = |(log2 C + b)/γ| made odd"
    layouts = EVERYWHERE

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        kernel_size: int | None = None,
        gamma: float = 2.0,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        k = adaptive_kernel(channels, gamma, beta) if kernel_size is None else kernel_size
        if k < 1 or k % 2 == 0:
            raise BadOption(f"kernel_size must be odd and at least 1, not {k}")
        beside = [0] * (dims - 1)
        self.conv = convolution(
            dims, 1, 1, (k, *(1 for _ in beside)), padding=(k // 2, *beside), bias=False
        )
        self.positions = positions(dims)
        self.gate = Gate("conv", is_sigmoid=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its mixed channel map."""
        pooled = x.mean(self.positions, keepdim=True).transpose(1, 2)  # (N, 1, C, ...)
        mixed: Tensor = self.gate(torch.sigmoid(self.conv(pooled)).transpose(1, 2), x)
        return x * mixed


def adaptive_kernel(channels: int, gamma: float, beta: float) -> int:
    """Return k of section 3.2.3: the odd number at or above the whole part of (log2 C + b) / γ.

    Raises:
        BadOption: γ is not above 0, or either is not finite.
    """
    if not 0 < gamma < math.inf or not math.isfinite(beta):
        raise BadOption(f"gamma must be above 0 and beta finite, not {gamma} and {beta}")
    size = int(abs((math.log2(channels) + beta) / gamma))
    return size if size % 2 else size + 1

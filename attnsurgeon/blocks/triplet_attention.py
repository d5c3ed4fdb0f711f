"""Triplet Attention (Misra et al., WACV 2021, arXiv:2010.03045), section 3.2.

y = (x₁ω₁ + x₂ω₂ + x ω₃) / 3, x₁ and x₂ rotated before and back after. Three maps: of (C, W), of
(C, H) and of (H, W), each the sigmoid of a normed convolution over the maximum and mean along the
third axis. Two-dimensional by its paper.

A gate per map: x * (m1 + m2 + m3) / 3. Closed, each mixed map is exactly 1, and so is 3 / 3 in
every float; at gate 1 it is y with x taken out of the sum, equal but for rounding.
"""

from __future__ import annotations

from torch import Tensor, nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import IMAGES, AttentionBlock
from attnsurgeon.blocks.convolutional_block_attention import SpatialMap
from attnsurgeon.errors import BadOption
from attnsurgeon.gate import Gate


class GatedMap(nn.Module):
    """The mixed map of x pooled along one axis, in a layout that multiplies x."""

    def __init__(self, axis: int, kernel_size: int) -> None:
        super().__init__()
        self.axis = axis
        self.map = SpatialMap(kernel_size, 2)
        self.gate = Gate("map.norm", is_sigmoid=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return (N, C, H, W) with a 1 in the place of the pooled axis."""
        attention = self.map(x.transpose(1, self.axis)).transpose(1, self.axis)
        return self.gate(attention, x)  # type: ignore[no-any-return]


@blocks.register("triplet")
class TripletAttention(AttentionBlock):
    """Rescale by maps over each pair of the axes C, H and W. (N, C, H, W) -> the same.

    Args:
        channels: C, the width of the feature map; it decides no shape here.
        kernel_size: k of the convolutions, odd; 7 in the paper.
        no_spatial: leave the (H, W) map (and its gate) out and average two.

    Raises:
        BadOption: a value out of range.
    """

    title = "Triplet Attention"
    paper = "arXiv:2010.03045"
    formula = "6k² + 6"
    layouts = IMAGES

    def __init__(self, channels: int, *, kernel_size: int = 7, no_spatial: bool = False) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise BadOption(f"kernel_size must be odd and at least 1, not {kernel_size}")
        pooled = (2, 3) if no_spatial else (2, 3, 1)
        self.first = GatedMap(pooled[0], kernel_size)
        self.others = nn.ModuleList(GatedMap(axis, kernel_size) for axis in pooled[1:])
        self.count = len(pooled)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times the mean of its mixed maps."""
        mixed = self.first(x)
        for other in self.others:
            mixed = mixed + other(x)
        return x * (mixed / self.count)  # type: ignore[no-any-return]

"""Concurrent Spatial and Channel Squeeze & Excitation (Roy et al., MICCAI 2018, arXiv:1803.02579).

Section 2: cSE, sSE, and their sum, scSE. The journal version (arXiv:1808.08127) takes the greater
of the two: `fusion=max`, as the released code does.

One gate per half. The sum is mixed as (1 - gc)(1 - gs) + gc * c + gs * s: with both gates at 0
that is exactly 1, with one of them at 1 the published half alone, with both the published sum.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import EVERYWHERE, AttentionBlock, hidden_width, one_of
from attnsurgeon.blocks.spatial import convolution, positions
from attnsurgeon.gate import Gate

FUSIONS = ("add", "max")


@blocks.register("scse")
class ConcurrentSqueezeExcitation(AttentionBlock):
    """Rescale channels and, beside that, positions. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of the feature map.
        dims: number of spatial axes.
        reduction: r: the channel half has C // r hidden units, at least 1; 2 in the paper.
        ratio: the hidden width as a share of C instead; overrides `reduction`.
        fusion: add (the conference paper) or max (the journal version).

    Raises:
        BadOption: a value out of range or unknown.
    """

    title = "Concurrent Spatial and Channel Squeeze & Excitation"
    paper = "arXiv:1803.02579"
    formula = "2C²/r + C/r + 2C + 1"
    layouts = EVERYWHERE

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        reduction: int = 2,
        ratio: float | None = None,
        fusion: str = "add",
    ) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction, ratio)
        self.channel = nn.Sequential(
            convolution(dims, channels, hidden, 1),
            nn.ReLU(),
            convolution(dims, hidden, channels, 1),
            nn.Sigmoid(),
        )
        self.spatial = nn.Sequential(convolution(dims, channels, 1, 1), nn.Sigmoid())
        self.takes_greater = one_of("fusion", fusion, FUSIONS) == "max"
        self.positions = positions(dims)
        # Sigmoids that are added are 1 together, where each of them is half of it.
        self.channel_gate = Gate("channel.2", is_sigmoid=self.takes_greater)
        self.spatial_gate = Gate("spatial.0", is_sigmoid=self.takes_greater)

    def forward(self, x: Tensor) -> Tensor:
        """Return x rescaled by both halves."""
        channel = self.channel(x.mean(self.positions, keepdim=True))
        spatial = self.spatial(x)
        if self.takes_greater:
            return torch.maximum(
                x * self.channel_gate(channel, x), x * self.spatial_gate(spatial, x)
            )
        nothing = x.new_zeros([1])  # mixing in a map of zeros leaves 1 - g
        rest = self.channel_gate(nothing, x) * self.spatial_gate(nothing, x)
        channel_share = rest + self.channel_gate.admit(channel, x)
        mixed: Tensor = channel_share + self.spatial_gate.admit(spatial, x)
        return x * mixed

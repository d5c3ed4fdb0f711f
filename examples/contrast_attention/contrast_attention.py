"""Contrast-aware Channel Attention (Hui et al., ACM Multimedia 2019, arXiv:1909.11856).

As squeeze-and-excitation, but a channel is squeezed to the sum of its standard deviation and its
mean. An example of attention outside attnsurgeon: installed as a package it is `--block contrast`,
without that it is `--block path/to/contrast_attention.py:ContrastAttention`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnsurgeon.blocks.block import AttentionBlock, hidden_width
from attnsurgeon.gate import Gate


class ContrastAttention(AttentionBlock):
    """Rescale each channel by a weight computed from the contrast of all. (N, C, H, W) -> the same.

    Args:
        channels: C, the width of the feature map.
        reduction: the hidden layer has C // reduction units, at least 1.
    """

    title = "Contrast-aware Channel Attention"
    paper = "arXiv:1909.11856"
    formula = "2C²/r + C/r + C"

    def __init__(self, channels: int, *, reduction: int = 16) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction, None)
        self.squeeze = nn.Conv2d(channels, hidden, 1)
        self.excite = nn.Conv2d(hidden, channels, 1)
        self.gate = Gate()  # starts at 0, where the mixed map is exactly 1

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its mixed channel map."""
        mean = x.mean((2, 3), keepdim=True)
        contrast = (x - mean).square().mean((2, 3), keepdim=True).sqrt() + mean
        attention = torch.sigmoid(self.excite(torch.relu(self.squeeze(contrast))))
        return x * self.gate(attention, x)  # type: ignore[no-any-return]

"""Coordinate Attention (Hou et al., CVPR 2021, arXiv:2103.02907), equations 4 to 9.

A map of rows and a map of columns, each behind a gate of its own. Two-dimensional by its paper.
The widths and the hard swish are those of the released code, which the paper leaves open.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import IMAGES, AttentionBlock, hidden_width, one_of
from attnsurgeon.blocks.squeeze_excitation import ACTIVATIONS
from attnsurgeon.errors import BadOption
from attnsurgeon.gate import Gate


@blocks.register("coord")
class CoordinateAttention(AttentionBlock):
    """Rescale each channel by its row and its column. (N, C, H, W) -> the same.

    Args:
        channels: C, the width of the feature map.
        reduction: r: the shared layer has max(C // r, min_width) channels.
        ratio: its width as a share of C instead; overrides `reduction`.
        min_width: the least of that width; 8 in the released code.
        activation: δ after the shared layer; hardswish in the released code.

    Raises:
        BadOption: a value out of range or unknown.
    """

    title = "Coordinate Attention"
    paper = "arXiv:2103.02907"
    formula = "3Cp + 3p + 2C, p = max(C/r, 8)"
    layouts = IMAGES

    def __init__(
        self,
        channels: int,
        *,
        reduction: int = 32,
        ratio: float | None = None,
        min_width: int = 8,
        activation: str = "hardswish",
    ) -> None:
        super().__init__()
        if min_width < 1:
            raise BadOption(f"min_width must be at least 1, not {min_width}")
        width = max(min_width, hidden_width(channels, reduction, ratio))
        self.shared = nn.Sequential(
            nn.Conv2d(channels, width, 1),
            nn.BatchNorm2d(width),
            ACTIVATIONS[one_of("activation", activation, tuple(ACTIVATIONS))](),
        )
        self.rows = nn.Conv2d(width, channels, 1)
        self.columns = nn.Conv2d(width, channels, 1)
        self.row_gate = Gate("rows", is_sigmoid=True)
        self.column_gate = Gate("columns", is_sigmoid=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its mixed row map, times its mixed column map."""
        height = x.shape[2]
        along = x.mean(2, keepdim=True).transpose(2, 3)  # (N, C, W, 1)
        both = self.shared(torch.cat((x.mean(3, keepdim=True), along), 2))  # (N, p, H + W, 1)
        rows = torch.sigmoid(self.rows(both[:, :, :height]))
        columns = torch.sigmoid(self.columns(both[:, :, height:].transpose(2, 3)))
        attended: Tensor = x * self.row_gate(rows, x) * self.column_gate(columns, x)
        return attended

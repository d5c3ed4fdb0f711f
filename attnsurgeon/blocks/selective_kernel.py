"""Selective Kernel (Li et al., CVPR 2019, arXiv:1903.06586), equations 1 to 6.

Branch 0 is what the host already has: its pretrained convolution + norm + activation where the
block replaces a 3x3 (`replace`), or the feature map itself elsewhere. Branches 1 to M - 1 are
new. The gate mixes the branch weights: w0 = (1 - g) + g * a0, wi = g * ai.

Differs from the paper: each branch is pooled before the sum, as U0 + U1 can overflow float16
while the sum of their means cannot; where the width is not divisible by the groups, their
greatest common divisor is taken.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import AROUND, MAPS, AttentionBlock, Place
from attnsurgeon.blocks.spatial import batch_norm, convolution, per_axis, positions
from attnsurgeon.blocks.vector_norm import vector_norm
from attnsurgeon.errors import BadOption
from attnsurgeon.gate import Gate


@blocks.register("sk")
class SelectiveKernel(AttentionBlock):
    """Choose per channel among branches of several reaches. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of what is returned.
        in_channels: width of the input of the new branches; C unless a convolution is replaced.
        stride: of the new branches, that of the replaced convolution.
        dilation: of the replaced convolution.
        dims: number of spatial axes.
        branches: M, at least 2, the host's own included.
        groups: G of the new branches.
        reduction: r: the squeezed width is d = max(C / r, min_width).
        min_width: L.
        dilated: branch i is a 3x3 of dilation 1 + i; else a true (3 + 2i) x (3 + 2i) kernel.
        dense: the first author's form for dense hosts: every branch a plain 3x3, d = C / r.
        norm: of the squeezed vector: batch (as published) or layer (trains on a batch of 1).

    Raises:
        BadOption: a value out of range or unknown.
    """

    title = "Selective Kernel"
    paper = "arXiv:1903.06586"
    formula = (
        "(M-1)(9C²/G + 2C) + Cd + 2d + MdC, d = max(C/r, L); replaced: the host's 9C²/G' + 2C stay"
    )
    placements = (*AROUND, "replace")
    layouts = MAPS
    convex = True

    def __init__(
        self,
        channels: int,
        *,
        in_channels: int | None = None,
        stride: tuple[int, ...] = (1, 1),
        dilation: int = 1,
        dims: int = 2,
        branches: int = 2,
        groups: int = 32,
        reduction: int = 16,
        min_width: int = 32,
        dilated: bool = True,
        dense: bool = False,
        norm: str = "batch",
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("branches", branches, 2),
            ("groups", groups, 1),
            ("reduction", reduction, 1),
            ("min_width", min_width, 1),
        ):
            if value < least:
                raise BadOption(f"{name} must be at least {least}, not {value}")
        self.branches = branches
        inner = channels if in_channels is None else in_channels
        shared = math.gcd(groups, inner, channels)
        self.paths = nn.ModuleList()
        for i in range(1, branches):
            kernel, spread = _reach(i, dilated, dense)
            spread *= dilation
            conv = convolution(
                dims,
                inner,
                channels,
                kernel,
                stride=per_axis("stride", stride, dims),
                padding=spread * (kernel // 2),
                dilation=spread,
                groups=shared,
                bias=False,
            )
            self.paths.append(nn.Sequential(conv, batch_norm(dims, channels), nn.ReLU()))
        width = max(1 if dense else min_width, channels // reduction)
        self.squeeze = convolution(dims, channels, width, 1, bias=False)
        self.norm = vector_norm(norm, width, dims)
        self.select = convolution(dims, width, branches * channels, 1, bias=False)
        self.positions = positions(dims)
        self.gate = Gate()

    @classmethod
    def measured(cls, place: Place) -> dict[str, Any]:
        """Return all of a place: new branches are shaped like the replaced convolution."""
        return {
            "in_channels": place.in_channels,
            "stride": place.stride,
            "dilation": place.dilation,
            "dims": place.dims,
        }

    def forward(self, x: Tensor, first: Tensor | None = None) -> Tensor:
        """Return the branches, summed by their mixed weights.

        Args:
            x: what the new branches read, (N, C_in, *spatial).
            first: branch 0, (N, C, *spatial'); x itself where nothing is replaced.
        """
        host = x if first is None else first
        maps = [host]
        squeezed = host.mean(self.positions, keepdim=True).float()
        for path in self.paths:
            branch = path(x)
            maps.append(branch)
            squeezed = squeezed + branch.mean(self.positions, keepdim=True).float()
        hidden = torch.relu(self.norm(self.squeeze(squeezed.to(host.dtype))))
        logits = self.select(hidden).unflatten(1, (self.branches, -1))  # (N, M, C, 1, 1)
        attention = torch.softmax(logits, 1)
        out: Tensor = host * self.gate(attention[:, 0], host)
        for i, branch in enumerate(maps[1:]):
            out = out + branch * self.gate.admit(attention[:, i + 1], branch)
        return out


def _reach(i: int, dilated: bool, dense: bool) -> tuple[int, int]:
    """Return kernel size and dilation of branch i."""
    if dense:
        return 3, 1
    return (3, 1 + i) if dilated else (3 + 2 * i, 1)

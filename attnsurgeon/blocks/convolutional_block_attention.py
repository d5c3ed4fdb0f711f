"""Convolutional Block Attention Module (Woo et al., ECCV 2018, arXiv:1807.06521), equations 1 to 3.

Channel map, then spatial map, each behind a gate of its own. Differs from the released code: the
spatial BatchNorm starts at weight 1, not 0 (a zero behind a closed gate would learn one step
late), and the shared perceptron is made of 1x1 convolutions.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import MAPS, AttentionBlock, hidden_width, some_of
from attnsurgeon.blocks.spatial import batch_norm, convolution, positions
from attnsurgeon.errors import BadOption
from attnsurgeon.gate import Gate


class ChannelPool(nn.Module):
    """Pool each channel over all positions. (N, C, H, W) -> (N, C, 1, 1)."""

    def __init__(self, kind: str, dims: int) -> None:
        super().__init__()
        self.kind = kind
        self.positions = positions(dims)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean, maximum, 2-norm or log-sum-exp of each channel."""
        if self.kind == "avg":
            return x.mean(self.positions, keepdim=True)
        if self.kind == "max":
            return x.amax(self.positions, keepdim=True)
        if self.kind == "lp":
            norm: Tensor = torch.linalg.vector_norm(x, 2.0, dim=self.positions, keepdim=True)
            return norm
        return torch.logsumexp(x, self.positions, keepdim=True)


POOLS = ("avg", "max", "lp", "lse")


class ChannelMap(nn.Module):
    """Equation 2: sigmoid of the sum of one shared perceptron over several poolings."""

    def __init__(self, channels: int, hidden: int, pool_types: tuple[str, ...], dims: int) -> None:
        super().__init__()
        self.pool = ChannelPool(pool_types[0], dims)
        self.more_pools = nn.ModuleList(ChannelPool(kind, dims) for kind in pool_types[1:])
        self.mlp = nn.Sequential(
            convolution(dims, channels, hidden, 1),
            nn.ReLU(),
            convolution(dims, hidden, channels, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the channel map (N, C, 1, 1) in (0, 1)."""
        logits = self.mlp(self.pool(x))
        for pool in self.more_pools:
            logits = logits + self.mlp(pool(x))
        return torch.sigmoid(logits)


class SpatialMap(nn.Module):
    """Equation 3: sigmoid of a normed k x k convolution over (max, mean) of the channels."""

    def __init__(self, kernel_size: int, dims: int) -> None:
        super().__init__()
        self.conv = convolution(dims, 2, 1, kernel_size, padding=kernel_size // 2, bias=False)
        self.norm = batch_norm(dims, 1, eps=1e-5, momentum=0.01)

    def forward(self, x: Tensor) -> Tensor:
        """Return the spatial map (N, 1, H, W) in (0, 1)."""
        pooled = torch.cat((x.amax(1, keepdim=True), x.mean(1, keepdim=True)), 1)
        return torch.sigmoid(self.norm(self.conv(pooled)))


class NoSpatialMap(nn.Module):
    """Stand where `no_spatial` leaves the spatial half out."""

    def forward(self, x: Tensor) -> Tensor:
        """Return x itself."""
        return x


class GatedSpatial(nn.Module):
    """The spatial half: x times its mixed spatial map."""

    def __init__(self, kernel_size: int, dims: int) -> None:
        super().__init__()
        self.map = SpatialMap(kernel_size, dims)
        self.gate = Gate("map.norm", is_sigmoid=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its mixed spatial map."""
        mixed: Tensor = self.gate(self.map(x), x)
        return x * mixed


@blocks.register("cbam")
class ConvolutionalBlockAttention(AttentionBlock):
    """Rescale channels, then positions. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of the feature map.
        dims: number of spatial axes.
        reduction: r: the shared perceptron has C // r hidden units, at least 1.
        ratio: the hidden width as a share of C instead; overrides `reduction`.
        pool_types: what the channel map pools by, out of avg, max, lp, lse.
        no_spatial: leave the spatial half (and its gate) out.
        kernel_size: of the spatial convolution, odd; 7 in the paper.

    Raises:
        BadOption: a value out of range or unknown.
    """

    title = "Convolutional Block Attention Module"
    paper = "arXiv:1807.06521"
    formula = "2C²/r + C/r + C + 2k² + 2"
    layouts = MAPS

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        reduction: int = 16,
        ratio: float | None = None,
        pool_types: tuple[str, ...] = ("avg", "max"),
        no_spatial: bool = False,
        kernel_size: int = 7,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise BadOption(f"kernel_size must be odd and at least 1, not {kernel_size}")
        hidden = hidden_width(channels, reduction, ratio)
        self.channel = ChannelMap(channels, hidden, some_of("pool_types", pool_types, POOLS), dims)
        self.channel_gate = Gate("channel.mlp.2", is_sigmoid=True)
        self.spatial = NoSpatialMap() if no_spatial else GatedSpatial(kernel_size, dims)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its mixed channel map, times the mixed spatial map of that."""
        x = x * self.channel_gate(self.channel(x), x)
        return self.spatial(x)  # type: ignore[no-any-return]

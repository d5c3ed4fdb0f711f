"""Global Context block (Cao et al., ICCVW 2019, arXiv:1904.11492).

Differs from the released code: the last 1x1 convolution starts at its ordinary value, since the
gate already is the zero (two zeros in series would never learn).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import EVERYWHERE, AttentionBlock, hidden_width, one_of, some_of
from attnsurgeon.blocks.spatial import convolution, positions
from attnsurgeon.gate import Gate

FUSIONS = ("channel_add", "channel_mul")


class ContextPool(nn.Module):
    """Sum the positions by a softmax over them. (N, C, H, W) -> (N, C, 1, 1)."""

    __constants__ = ("dims",)

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.mask = convolution(dims, channels, 1, 1)
        self.dims = dims

    def forward(self, x: Tensor) -> Tensor:
        """Return the attended mean of the positions."""
        mask = torch.softmax(self.mask(x).flatten(2), 2)  # (N, 1, HW)
        context = torch.matmul(x.flatten(2), mask.transpose(1, 2))
        if self.dims > 1:
            context = context.unsqueeze(3)
        if self.dims > 2:
            context = context.unsqueeze(3)
        return context  # (N, C, 1, ...)


class MeanPool(nn.Module):
    """Average the positions. (N, C, H, W) -> (N, C, 1, 1)."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.positions = positions(dims)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of the positions."""
        return x.mean(self.positions, keepdim=True)


def transform(channels: int, hidden: int, dims: int) -> nn.Sequential:
    """Return the bottleneck transform: 1x1, LayerNorm, ReLU, 1x1, both with bias."""
    return nn.Sequential(
        convolution(dims, channels, hidden, 1),
        nn.LayerNorm([hidden] + [1] * dims),
        nn.ReLU(),
        convolution(dims, hidden, channels, 1),
    )


class MultiplyContext(nn.Module):
    """Multiply by the sigmoid of the transformed context."""

    def __init__(self, channels: int, hidden: int, dims: int) -> None:
        super().__init__()
        self.transform = transform(channels, hidden, dims)
        self.gate = Gate("transform.3", is_sigmoid=True)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return x times the mixed map of its context."""
        mixed: Tensor = self.gate(torch.sigmoid(self.transform(context)), x)
        return x * mixed


class AddContext(nn.Module):
    """Add the transformed context to every position."""

    def __init__(self, channels: int, hidden: int, dims: int) -> None:
        super().__init__()
        self.transform = transform(channels, hidden, dims)
        self.gate = Gate("transform.3")

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Return x plus the admitted share of its context."""
        return x + self.gate.admit(self.transform(context), x)


@blocks.register("gc")
class GlobalContext(AttentionBlock):
    """Add one attended summary of the whole map to every position. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of the feature map.
        dims: number of spatial axes.
        reduction: the bottleneck has C // reduction units, at least 1.
        ratio: the bottleneck width as a share of C instead (the paper's name; 1/16, and 1/4 in
            its strongest results); overrides `reduction`.
        pooling: att (a softmax over positions) or avg.
        fusion: channel_add, channel_mul, or both (the multiplication comes first).

    Raises:
        BadOption: a value out of range or unknown.
    """

    title = "Global Context"
    paper = "arXiv:1904.11492"
    formula = "2Cp + 3p + 2C + 1, p = C/r"
    layouts = EVERYWHERE

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        reduction: int = 16,
        ratio: float | None = None,
        pooling: str = "att",
        fusion: tuple[str, ...] = ("channel_add",),
    ) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction, ratio)
        attended = one_of("pooling", pooling, ("att", "avg")) == "att"
        chosen = some_of("fusion", fusion, FUSIONS)
        self.pool = ContextPool(channels, dims) if attended else MeanPool(dims)
        self.fuse = nn.ModuleList()
        if "channel_mul" in chosen:
            self.fuse.append(MultiplyContext(channels, hidden, dims))
        if "channel_add" in chosen:
            self.fuse.append(AddContext(channels, hidden, dims))

    def forward(self, x: Tensor) -> Tensor:
        """Return x with its context fused in."""
        context = self.pool(x)
        for fuse in self.fuse:
            x = fuse(x, context)
        return x

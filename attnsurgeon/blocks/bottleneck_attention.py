"""Bottleneck Attention Module (Park et al., BMVC 2018, arXiv:1807.06514), equations 1 to 4.

The map is 1 + σ(Mc + Ms): both halves stand in one sigmoid, so they share one gate. At gate 1 the
output is x * (1 + M), the paper's x + x * M but for rounding.

Differs from the equations: a ReLU between the layers of each half, which they leave out; without
it the layers would be one. The released code differs from the paper: it norms each hidden layer
instead of the last, and multiplies the halves instead of adding them: `form=released`. Pooled
vectors are 1x1 maps here. The paper puts it after each stage but the last: --at names the blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import MAPS, AttentionBlock, hidden_width, one_of
from attnsurgeon.blocks.spatial import batch_norm, convolution, positions
from attnsurgeon.blocks.vector_norm import vector_norm
from attnsurgeon.errors import BadOption
from attnsurgeon.gate import Gate

FORMS = ("paper", "released")


def half(
    widths: Sequence[int], layers: list[nn.Module], norm: Callable[[int], nn.Module], form: str
) -> nn.Sequential:
    """Return layers with a ReLU between; a norm after the last (paper) or each other (released)."""
    steps: list[nn.Module] = []
    for i, layer in enumerate(layers):
        is_last = i == len(layers) - 1
        steps.append(layer)
        if is_last == (form == "paper"):
            steps.append(norm(widths[i]))
        if not is_last:
            steps.append(nn.ReLU())
    return nn.Sequential(*steps)


@blocks.register("bam")
class BottleneckAttention(AttentionBlock):
    """Rescale by one plus a map of channels and positions. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of the feature map.
        dims: number of spatial axes.
        reduction: r: both halves have C // r hidden channels, at least 1.
        ratio: the hidden width as a share of C instead; overrides `reduction`.
        dilation: d of the two 3x3 convolutions.
        form: paper (equations 2 to 4) or released (the authors' code).
        norm: of the channel half: batch (as published) or layer (trains on a batch of 1).

    Raises:
        BadOption: a value out of range or unknown.
    """

    title = "Bottleneck Attention Module"
    paper = "arXiv:1807.06514"
    formula = "3Cp + 18p² + 5p + 3C + 3, p = C/r"
    layouts = MAPS

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        reduction: int = 16,
        ratio: float | None = None,
        dilation: int = 4,
        form: str = "paper",
        norm: str = "batch",
    ) -> None:
        super().__init__()
        if dilation < 1:
            raise BadOption(f"dilation must be at least 1, not {dilation}")
        one_of("form", form, FORMS)
        hidden = hidden_width(channels, reduction, ratio)
        self.channel = half(
            (hidden, channels),
            [convolution(dims, channels, hidden, 1), convolution(dims, hidden, channels, 1)],
            lambda width: vector_norm(norm, width, dims),
            form,
        )
        wide = {"kernel_size": 3, "padding": dilation, "dilation": dilation}
        self.spatial = half(
            (hidden, hidden, hidden, 1),
            [
                convolution(dims, channels, hidden, 1),
                convolution(dims, hidden, hidden, **wide),
                convolution(dims, hidden, hidden, **wide),
                convolution(dims, hidden, 1, 1),
            ],
            lambda width: batch_norm(dims, width),
            form,
        )
        self.multiplies = form == "released"
        self.positions = positions(dims)
        self.gate = Gate()

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its mixed map, which is between 1 and 2."""
        channel = self.channel(x.mean(self.positions, keepdim=True))
        spatial = self.spatial(x)
        logits = channel * spatial if self.multiplies else channel + spatial
        mixed: Tensor = self.gate(1 + torch.sigmoid(logits), x)
        return x * mixed

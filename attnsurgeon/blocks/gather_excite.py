"""Gather-Excite (Hu et al., NeurIPS 2018, arXiv:1810.12348), sections 2 and 3.

GE-θ⁻ (the default here) gathers by averages and has no parameters; GE-θ gathers by depthwise
convolutions (`extra_params`); GE-θ⁺ puts the two layers of SE behind that (`mlp` as well). SE is
the global extent without convolutions, with `mlp`.

Differs from the paper: the global extent with convolutions is refused, since its kernel is as
large as the map, which fixes the size of the image. Each 3x3 depthwise convolution of stride 2 is
followed by a BatchNorm, with a ReLU between two.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import MAPS, AttentionBlock, hidden_width
from attnsurgeon.blocks.spatial import average_pool, batch_norm, convolution, positions
from attnsurgeon.errors import BadOption
from attnsurgeon.gate import Gate

EXTENTS = (0, 2, 4, 8)
"""Ratios e of section 3; 0 stands for the whole map."""


class GlobalMean(nn.Module):
    """Average all positions. (N, C, H, W) -> (N, C, 1, 1)."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.positions = positions(dims)

    def forward(self, x: Tensor) -> Tensor:
        """Return the mean of the positions."""
        return x.mean(self.positions, keepdim=True)


def convolutions(channels: int, extent: int, dims: int) -> nn.Sequential:
    """Return log2(extent) depthwise 3x3 convolutions of stride 2, normed, with ReLUs between."""
    steps: list[nn.Module] = []
    while extent > 1:
        shape = {"kernel_size": 3, "stride": 2, "padding": 1}
        conv = convolution(dims, channels, channels, **shape, groups=channels, bias=False)
        steps += [conv, batch_norm(dims, channels)]
        extent //= 2
        if extent > 1:
            steps.append(nn.ReLU())
    return nn.Sequential(*steps)


@blocks.register("ge")
class GatherExcite(AttentionBlock):
    """Rescale by what a neighbourhood of each position gathered. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of the feature map.
        dims: number of spatial axes.
        extent: e, the ratio of the neighbourhood (2e - 1 positions wide): 2, 4, 8 or 0 for all.
        extra_params: gather by depthwise convolutions (θ) instead of averages; needs an extent.
        mlp: put two 1x1 layers behind the gathering, as in SE (θ⁺).
        reduction: r of those layers: C // r hidden units, at least 1.
        ratio: the hidden width as a share of C instead; overrides `reduction`.

    Raises:
        BadOption: a value out of range or unknown.
    """

    title = "Gather-Excite"
    paper = "arXiv:1810.12348"
    formula = "0; extra_params: 11C log2 e; mlp: 2C²/r + C/r + C"
    layouts = MAPS

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        extent: int = 0,
        extra_params: bool = False,
        mlp: bool = False,
        reduction: int = 16,
        ratio: float | None = None,
    ) -> None:
        super().__init__()
        if extent not in EXTENTS:
            raise BadOption(f"extent must be 2, 4, 8 or 0 for the whole map, not {extent}")
        if extra_params and not extent:
            raise BadOption("extra_params needs an extent of 2, 4 or 8: the whole map has no size")
        hidden = hidden_width(channels, reduction, ratio)
        self.gather: nn.Module = GlobalMean(dims)
        last = ""
        if extra_params:
            self.gather = convolutions(channels, extent, dims)
            last = f"gather.{len(self.gather) - 1}"
        elif extent:
            self.gather = average_pool(dims, 2 * extent - 1, extent)
        self.mlp = nn.Sequential()
        if mlp:
            layers = convolution(dims, channels, hidden, 1), convolution(dims, hidden, channels, 1)
            self.mlp = nn.Sequential(layers[0], nn.ReLU(), layers[1])
        self.is_local = extent > 0
        self.gate = Gate("mlp.2" if mlp else last, is_sigmoid=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its mixed map, spread to the size of x by nearest neighbours."""
        gathered = self.mlp(self.gather(x))
        if self.is_local:
            gathered = F.interpolate(gathered, size=x.shape[2:])
        mixed: Tensor = self.gate(torch.sigmoid(gathered), x)
        return x * mixed

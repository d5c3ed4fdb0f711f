"""Non-local block (Wang et al., CVPR 2018, arXiv:1711.07971), equations 1 to 6.

z = x + Wz y, y_i = Σ_j f(x_i, x_j) g(x_j) / C(x): f the exponential of θᵀφ and C its sum, which is
a softmax (embedded Gaussian, equation 3), or f = θᵀφ and C the number of positions (dot product,
equation 4). Without the softmax the three factors are multiplied the cheap way round.

Differs from the paper: Wz (or, with `norm`, the BatchNorm that section 4.1 puts behind it) starts
at its ordinary value, since the gate already is the zero. Sub-sampling pools pairs of positions;
of an odd number the last is kept, so that any size works. Half precision is compared in float32,
as products of float16 features overflow, and a dot product that overflows all the same saturates:
0 times infinity would be NaN behind a closed gate.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import EVERYWHERE, AttentionBlock, hidden_width, one_of
from attnsurgeon.blocks.spatial import at_least_float32, batch_norm, convolution, halving_pool
from attnsurgeon.gate import Gate

PAIRWISE = ("embedded_gaussian", "dot_product")


@blocks.register("nonlocal")
class NonLocal(AttentionBlock):
    """Add to each position a sum over all, weighed by likeness. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of the feature map.
        dims: number of spatial axes.
        reduction: θ, φ and g have C // reduction channels, at least 1; 2 in the paper.
        ratio: their width as a share of C instead; overrides `reduction`.
        pairwise: embedded_gaussian (a softmax) or dot_product.
        subsample: pool φ and g to every second position of the image axes (section 3.3), which
            takes a quarter of the memory and time of an image.
        norm: a BatchNorm behind the last layer, as in the video experiments.

    Raises:
        BadOption: a value out of range or unknown.
    """

    title = "Non-local block"
    paper = "arXiv:1711.07971"
    formula = "4Cp + 3p + C, p = C/2"
    layouts = EVERYWHERE

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        reduction: int = 2,
        ratio: float | None = None,
        pairwise: str = "embedded_gaussian",
        subsample: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction, ratio)
        self.theta = convolution(dims, channels, hidden, 1)
        self.phi = convolution(dims, channels, hidden, 1)
        self.g = convolution(dims, channels, hidden, 1)
        self.pool = halving_pool(dims) if subsample else nn.Identity()
        self.restore = convolution(dims, hidden, channels, 1)
        self.norm = batch_norm(dims, channels) if norm else nn.Identity()
        self.has_softmax = one_of("pairwise", pairwise, PAIRWISE) == "embedded_gaussian"
        self.gate = Gate("norm" if norm else "restore")

    def forward(self, x: Tensor) -> Tensor:
        """Return x plus the admitted share of its non-local sum."""
        theta = self.theta(x)
        queries = at_least_float32(theta).flatten(2).transpose(1, 2)  # (N, positions, p)
        keys = at_least_float32(self.pool(self.phi(x))).flatten(2)  # (N, p, positions')
        values = at_least_float32(self.pool(self.g(x))).flatten(2).transpose(1, 2)
        if self.has_softmax:
            summed = torch.matmul(torch.softmax(torch.matmul(queries, keys), 2), values)
        else:
            summed = torch.matmul(queries, torch.matmul(keys, values) / keys.shape[2])
        # (N, positions, p) -> (N, p, *spatial)
        gathered = summed.transpose(1, 2).reshape(theta.shape).to(theta.dtype)
        term = self.norm(self.restore(gathered))
        if not self.has_softmax:
            term = torch.nan_to_num(term)
        return x + self.gate.admit(term, x)

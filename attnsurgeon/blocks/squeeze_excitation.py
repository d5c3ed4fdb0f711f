"""Squeeze-and-Excitation (Hu et al., CVPR 2018, arXiv:1709.01507), equations 2 to 4.

Differs from the paper: 1x1 convolutions stand for its fully connected layers.
"""

from __future__ import annotations

from torch import Tensor, nn

from attnsurgeon import blocks
from attnsurgeon.blocks.block import EVERYWHERE, AttentionBlock, hidden_width, one_of
from attnsurgeon.blocks.spatial import convolution, positions
from attnsurgeon.gate import Gate

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "relu": nn.ReLU,
    "relu6": nn.ReLU6,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "hardswish": nn.Hardswish,
}
SCALES: dict[str, type[nn.Module]] = {"sigmoid": nn.Sigmoid, "hardsigmoid": nn.Hardsigmoid}


@blocks.register("se")
class SqueezeExcitation(AttentionBlock):
    """Rescale each channel by a weight computed from all channels. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of the feature map.
        dims: number of spatial axes.
        reduction: r of the paper: the hidden layer has C // r units, at least 1.
        ratio: the hidden width as a share of C instead; overrides `reduction`.
        bias: biases on both layers, as in the released models (the journal text prefers none).
        activation: between the layers; relu in the paper.
        scale_activation: after them; sigmoid in the paper, hardsigmoid in mobile networks.

    Raises:
        BadOption: a value out of range or unknown.
    """

    title = "Squeeze-and-Excitation"
    paper = "arXiv:1709.01507"
    formula = "2C²/r + C/r + C"
    layouts = EVERYWHERE

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        reduction: int = 16,
        ratio: float | None = None,
        bias: bool = True,
        activation: str = "relu",
        scale_activation: str = "sigmoid",
    ) -> None:
        super().__init__()
        hidden = hidden_width(channels, reduction, ratio)
        self.squeeze = convolution(dims, channels, hidden, 1, bias=bias)
        self.activation = ACTIVATIONS[one_of("activation", activation, tuple(ACTIVATIONS))]()
        self.excite = convolution(dims, hidden, channels, 1, bias=bias)
        self.scale = SCALES[one_of("scale_activation", scale_activation, tuple(SCALES))]()
        self.positions = positions(dims)
        self.gate = Gate("excite", is_sigmoid=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its mixed channel map."""
        squeezed = x.mean(self.positions, keepdim=True)
        attention = self.scale(self.excite(self.activation(self.squeeze(squeezed))))
        mixed: Tensor = self.gate(attention, x)
        return x * mixed

"""Effective Squeeze-Excitation (Lee and Park, CVPR 2020, arXiv:1911.06667), of VoVNetV2.

The map is A_eSE(x) = σ(W_C GAP(x)), squeeze-and-excitation with one layer of full width.

Differs from the paper: a 1x1 convolution stands for its fully connected layer. Its released code
has a hard sigmoid where the equation has a sigmoid: `scale_activation=hardsigmoid`.
"""

from __future__ import annotations

from torch import Tensor

from attnsurgeon import blocks
from attnsurgeon.blocks.block import EVERYWHERE, AttentionBlock, one_of
from attnsurgeon.blocks.spatial import convolution, positions
from attnsurgeon.blocks.squeeze_excitation import SCALES
from attnsurgeon.gate import Gate


@blocks.register("ese")
class EffectiveSqueezeExcitation(AttentionBlock):
    """Rescale each channel by one full layer over all of them. (N, C, *spatial) -> the same.

    Args:
        channels: C, the width of the feature map.
        dims: number of spatial axes.
        bias: of the layer, as in the released models.
        scale_activation: sigmoid as in the paper, or hardsigmoid as in the released code.

    Raises:
        BadOption: an unknown value.
    """

    title = "Effective Squeeze-Excitation"
    paper = "arXiv:1911.06667"
    formula = "C² + C"
    layouts = EVERYWHERE

    def __init__(
        self,
        channels: int,
        *,
        dims: int = 2,
        bias: bool = True,
        scale_activation: str = "sigmoid",
    ) -> None:
        super().__init__()
        self.excite = convolution(dims, channels, channels, 1, bias=bias)
        self.scale = SCALES[one_of("scale_activation", scale_activation, tuple(SCALES))]()
        self.positions = positions(dims)
        self.gate = Gate("excite", is_sigmoid=True)

    def forward(self, x: Tensor) -> Tensor:
        """Return x times its mixed channel map."""
        attention = self.scale(self.excite(x.mean(self.positions, keepdim=True)))
        mixed: Tensor = self.gate(attention, x)
        return x * mixed

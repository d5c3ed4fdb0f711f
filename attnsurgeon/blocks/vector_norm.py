"""The norm of a squeezed vector: one value per channel and image."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from attnsurgeon.blocks.block import one_of

NORMS = ("batch", "layer")


class VectorNorm(nn.BatchNorm2d):
    """BatchNorm over (N, d, 1, ...) that says what to do when there is only one vector."""

    def forward(self, x: Tensor) -> Tensor:
        """Norm each feature over the batch.

        Raises:
            AssertionError: training on a batch of 1, whose variance is 0.
        """
        if self.training:
            torch._assert(  # unlike `raise`, this can be traced symbolically
                x.shape[0] > 1,
                "this attention cannot train on a batch of 1: its squeezed vector has one value "
                "per channel to norm; use a larger batch, or insert it with norm=layer",
            )
            self.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        return F.batch_norm(  # TorchScript knows no super().forward
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            0.1,
            self.eps,
        )


def vector_norm(norm: str, width: int, dims: int) -> nn.Module:
    """Return the norm of (N, width, 1, ...): over the batch, or over each vector's own values.

    Raises:
        BadOption: `norm` is neither batch nor layer.
    """
    if one_of("norm", norm, NORMS) == "batch":
        return VectorNorm(width)
    return nn.LayerNorm([width] + [1] * dims)

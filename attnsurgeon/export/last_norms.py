"""Norms that are gates, written out so that no exporter folds them into a convolution.

A gate of the form `layer` may be a batch norm (CBAM's spatial map ends in one). Folded, its weight
would be in no file by its name, and what is behind it could not be opened there.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from attnsurgeon.gate import LayerGate


class _WrittenOut(nn.Module):
    """A batch norm in eval mode as plain arithmetic, with the very tensors under their names."""

    def __init__(self, norm: nn.modules.batchnorm._BatchNorm) -> None:
        super().__init__()
        self.weight, self.bias = norm.weight, norm.bias
        self.register_buffer("running_mean", norm.running_mean)
        self.register_buffer("running_var", norm.running_var)
        self.eps = norm.eps
        self.train(norm.training)

    def forward(self, x: Tensor) -> Tensor:
        shape = [1, -1] + [1] * (x.dim() - 2)
        mean, variance = self.get_buffer("running_mean"), self.get_buffer("running_var")
        deviation = torch.sqrt(variance + self.eps).view(shape)
        normed = (x - mean.view(shape)) / deviation
        return normed * self.weight.view(shape) + self.bias.view(shape)


@contextmanager
def last_norms_written_out(model: nn.Module) -> Iterator[None]:
    """Put plain arithmetic in the place of norms that are gates, and the norms back."""
    held = []
    for path, module in model.named_modules():
        if isinstance(module, LayerGate):
            holder = model.get_submodule(path.rpartition(".")[0])
            above, _, name = module.last.rpartition(".")
            parent = holder.get_submodule(above)
            norm = parent.get_submodule(name)
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                held.append((parent, name, norm))
    try:
        for parent, name, norm in held:
            parent._modules[name] = _WrittenOut(norm)
        yield
    finally:
        for parent, name, norm in held:
            parent._modules[name] = norm

"""The five kernels of SyncBatchNorm that PyTorch has for accelerators only, by their formulas.

With them its own conversion, module, autograd function and collectives run on gloo and the CPU.
"""

import torch
from torch.nn.parallel import DistributedDataParallel


def install():
    """Let SyncBatchNorm run on CPU tensors in this process."""
    for kernel in (stats, gather_stats_with_counts, elemt, backward_reduce, backward_elemt):
        setattr(torch, f"batch_norm_{kernel.__name__}", kernel)
    torch._C._get_privateuse1_backend_name = lambda: "cpu"
    DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None


def _over_channels(vector):
    return vector.view(1, -1, 1, 1)


def stats(x, eps):
    variance, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, (variance + eps).rsqrt()


def gather_stats_with_counts(x, means, invstds, running_mean, running_var, momentum, eps, counts):
    shares = (counts / counts.sum()).view(-1, 1)
    mean = (shares * means).sum(0)
    variance = (shares * (invstds**-2 - eps + means**2)).sum(0) - mean**2
    if running_mean is not None:
        unbiased = variance * counts.sum() / (counts.sum() - 1)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(unbiased, momentum)
    return mean, (variance + eps).rsqrt()


def elemt(x, weight, bias, mean, invstd, eps):
    scale = _over_channels(weight * invstd)
    return (x - _over_channels(mean)) * scale + _over_channels(bias)


def backward_reduce(gradient, x, mean, invstd, weight, for_input, for_weight, for_bias):
    total = gradient.sum((0, 2, 3))
    with_x = (gradient * (x - _over_channels(mean))).sum((0, 2, 3))
    return total, with_x, with_x * invstd, total


def backward_elemt(gradient, x, mean, invstd, weight, total, with_x, counts):
    number = counts.sum()
    centred = gradient - _over_channels(total / number)
    along = (x - _over_channels(mean)) * _over_channels(invstd**2 * with_x / number)
    return (centred - along) * _over_channels(invstd * weight)

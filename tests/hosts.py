"""The networks every block is tried on, and batches small enough for two cores."""

import functools

import torch

from attnsurgeon import blocks
from attnsurgeon.host import load_host
from attnsurgeon.sites import find_sites

NAMES = (
    "resnet18",
    "resnet50",
    "resnext50_32x4d",
    "regnet_x_400mf",
    "mobilenet_v2",
    "efficientnet_b0",
    "convnext_tiny",
)


@functools.cache
def host(name):
    """Return the same random network each time; nothing may change it."""
    torch.manual_seed(0)
    return load_host(name, weights="none").eval()


@functools.cache
def sites(name):
    return tuple(find_sites(host(name), torch.zeros(1, 3, 64, 64)))


def offers(name, block, placement):
    """Tell whether any site of the host takes this block at this placement."""
    return placement in blocks.get(block).placements and any(
        placement in site.placements and block in site.blocks for site in sites(name)
    )


def image(batch=2, size=(64, 64)):
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(batch))

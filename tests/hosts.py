"""The networks every block is tried on, and batches small enough for two cores."""

import copy
import functools

import torch

import attnsurgeon
from attnsurgeon import blocks
from attnsurgeon.host import load_host
from attnsurgeon.plan import Plan, make_plan
from attnsurgeon.sites import find_sites
from attnsurgeon.surgery import apply_plan

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


EVERYWHERE = [
    ("se", "post"),
    ("gc", "standard"),
    ("cbam", "pre"),
    ("se", "identity"),
    ("sk", "replace"),
    ("cbam", "conv"),
    ("se", "post"),
]


def operate(name, opened=True):
    """Put attention at every placement of every fourth block, and open its gates."""
    operated = copy.deepcopy(host(name))
    cuts = []
    for block, placement in EVERYWHERE:
        apply_plan(operated, Plan(tuple(cuts)))
        cuts = make_plan(
            operated,
            sites(name),
            block,
            placement=placement,
            every=4,
            stack=True,
            # The default leaves so few hidden units that all can be off for two images.
            options={} if block == "sk" else {"reduction": 2},
        ).cuts
    apply_plan(operated, Plan(tuple(cuts)))
    if opened:
        for i, gate in enumerate(attnsurgeon.gates(operated).values()):
            gate.data.fill_(0.1 + 0.8 * (i % 7) / 7)
    return operated.eval()

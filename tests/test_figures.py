"""Parameter counts that the papers and their released code give, gates not counted."""

import pytest
import torch

from attnsurgeon import blocks
from attnsurgeon.card import HostCard
from attnsurgeon.host import rebuild_host
from attnsurgeon.plan import make_plan
from attnsurgeon.sites import find_sites
from attnsurgeon.surgery import apply_plan, count_parameters

FIGURES = [
    ("resnet18", "se", "standard", {}, (), 11_778_592),
    ("resnet50", "se", "standard", {}, (), 28_088_024),
    ("resnet101", "se", "standard", {}, (), 49_326_872),
    ("resnet50", "se", "standard", {"bias": False}, (), 28_071_976),
    ("resnext50_32x4d", "se", "standard", {}, (), 27_559_896),
    ("resnet18", "cbam", "standard", {}, (), 11_779_392),
    ("resnet50", "cbam", "standard", {}, (), 28_089_624),
    ("resnext50_32x4d", "sk", "replace", {}, (), 27_479_784),
    ("resnet50", "sk", "replace", {"dense": True}, (), 26_154_496),
    ("resnet50", "gc", "standard", {"ratio": 1 / 16}, (2, 3, 4), 28_078_773),
]


@pytest.mark.parametrize(("name", "block", "placement", "options", "stages", "expected"), FIGURES)
def test_published_figure(name, block, placement, options, stages, expected):
    model = rebuild_host(HostCard(name, "any"), weightless=True)
    plan = make_plan(
        model,
        find_sites(model, torch.zeros(1, 3, 64, 64)),
        block,
        placement=placement,
        options=options,
        stages=stages,
    )
    apply_plan(model, plan)
    counts = count_parameters(model)
    assert counts["before"] + counts["added"] == expected
    assert counts["after"] == expected + counts["gates"]
    assert counts["gates"] == len(plan.cuts) * (2 if block == "cbam" else 1)


def formula(block, c, *, r=16, k=7, m=2, g=32, low=32):
    """Return the parameters that the paper's formula gives."""
    d = max(c // r, low)
    p = c // r
    near = 3 * c * p + 18 * p * p + 5 * p + 3 * c + 3
    rows = max(c // 32, 8)
    odd = {64: 3, 256: 5, 2048: 7}  # of equation 12 of ECA
    return {
        "se": 2 * c * c // r + c // r + c,
        "cbam": 2 * c * c // r + c // r + c + 2 * k * k + 2,
        "gc": 2 * c * p + 3 * p + 2 * c + 1,
        "sk": (m - 1) * (9 * c * c // g + 2 * c) + c * d + 2 * d + m * d * c,
        "nonlocal": 2 * c * c + 5 * c // 2,
        "snl": c * c + 2 * c + 1,
        "eca": odd[c],
        "ese": c * c + c,
        "bam": near,
        "scse": c * c + c // 2 + 2 * c + 1,
        "ge": 0,
        "coord": 3 * c * rows + 3 * rows + 2 * c,
        "simam": 0,
        "triplet": 6 * k * k + 6,
    }[block]


@pytest.mark.parametrize("channels", [64, 256, 2048])
@pytest.mark.parametrize("block", blocks.names())
def test_formula(block, channels):
    built = blocks.get(block)(channels)
    gates = sum(p.numel() for n, p in built.named_parameters() if n.endswith("openness"))
    assert sum(p.numel() for p in built.parameters()) - gates == formula(block, channels)

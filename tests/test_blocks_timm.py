"""Blocks at gate 1 held against timm's modules of the same papers, with the same weights."""

import pytest
import timm.layers as layers
import torch
from timm.layers.cbam import CbamModule
from timm.layers.coord_attn import CoordAttn
from torch import nn

from tests.test_blocks import build, features, opened, settled

C = 32
ADD = {"fuse_add": True, "fuse_scale": False}
MEAN = {"use_attn": False}
LIKE = [
    ("se", {"reduction": 4}, layers.SEModule, {"rd_channels": 8}),
    ("ese", {"scale_activation": "hardsigmoid"}, layers.EffectiveSEModule, {}),
    ("eca", {}, layers.EcaModule, {"kernel_size": 3}),
    ("eca", {"kernel_size": 7}, layers.EcaModule, {"kernel_size": 7}),
    ("gc", {"reduction": 4}, layers.GlobalContext, {**ADD, "rd_channels": 8}),
    (
        "gc",
        {"reduction": 4, "pooling": "avg"},
        layers.GlobalContext,
        {**ADD, **MEAN, "rd_channels": 8},
    ),
    ("ge", {}, layers.GatherExcite, {"use_mlp": False}),
    ("ge", {"extent": 2}, layers.GatherExcite, {"use_mlp": False, "extent": 2}),
    ("ge", {"extent": 8}, layers.GatherExcite, {"use_mlp": False, "extent": 8}),
    ("nonlocal", {"norm": True}, layers.NonLocalAttn, {"use_scale": False, "rd_ratio": 0.5}),
    ("coord", {}, CoordAttn, {"rd_channels": 8, "bias": True}),
]


def theirs(kind, settings):
    """Return timm's module; ECA's is told its kernel only where it is told no channels."""
    return kind(**settings) if kind is layers.EcaModule else kind(C, **settings)


def hand_over(block, module):
    """Copy the weights of a block, in their order, into timm's module."""
    own = [tensor for key, tensor in block.state_dict().items() if "openness" not in key]
    state = module.state_dict()
    assert len(own) == len(state)
    for (key, held), tensor in zip(state.items(), own, strict=True):
        state[key] = tensor.reshape(held.shape)
    module.load_state_dict(state)
    for part in module.modules():
        if isinstance(part, nn.LayerNorm):
            part.eps = 1e-5  # of the authors' code for GC, and torch's default; theirs is 1e-6
    return module.eval()


def test_cbam_is_the_same_as_timm():
    block = settled(opened(build("cbam", reduction=4)))
    module = CbamModule(C, rd_channels=8, mlp_bias=True)
    first, _, last = block.channel.mlp
    module.channel.fc1.load_state_dict(first.state_dict())
    module.channel.fc2.load_state_dict(last.state_dict())
    # theirs reads (mean, max) where the released code, and ours, read (max, mean)
    module.spatial.conv.conv.weight.data = block.spatial.map.conv.weight.data.flip(1)
    module.spatial.conv.bn.load_state_dict(block.spatial.map.norm.state_dict())
    x = features()
    # Another order of the same sums: float32 rounding.
    torch.testing.assert_close(block(x), module.eval()(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options", "kind", "settings"), LIKE)
@pytest.mark.parametrize("size", [8, 5])
def test_the_same_as_timm(name, options, kind, settings, size):
    block = settled(opened(build(name, **options)))
    module = hand_over(block, theirs(kind, settings))
    x = features(size=size)
    # Another order of the same sums: float32 rounding.
    torch.testing.assert_close(block(x), module(x.clone()), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(opened(block, 0.9)(x), module(x.clone()), atol=1e-5)


def test_depthwise_gathering_is_of_the_same_layers():
    block = build("ge", extent=4, extra_params=True)
    kinds = [type(layer) for layer in block.gather]
    assert kinds == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Conv2d, nn.BatchNorm2d]

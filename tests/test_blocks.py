"""Each block is the published one at gate 1, nothing at gate 0, and every option does something."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attnsurgeon import blocks
from attnsurgeon.errors import BadOption, UnknownName
from attnsurgeon.export.torchscript import make_torchscript
from attnsurgeon.gate import Gate, named_gates

CHANNELS = 32


def features(channels=CHANNELS, batch=2, size=8):
    generator = torch.Generator().manual_seed(channels)
    return torch.randn(batch, channels, size, size, generator=generator)


def build(name, **options):
    torch.manual_seed(3)
    return blocks.get(name)(CHANNELS, **options).eval()


def opened(block, value=1.0):
    with torch.no_grad():
        for gate in named_gates(block).values():
            gate.fill_(value)
    return block


def published_se(block, x):
    """Equations 2 to 4 of arXiv:1709.01507, with matrix products."""
    z = x.mean((2, 3))
    w1, w2 = block.squeeze, block.excite
    s = torch.sigmoid(
        F.linear(
            F.relu(F.linear(z, w1.weight[:, :, 0, 0], w1.bias)), w2.weight[:, :, 0, 0], w2.bias
        )
    )
    return x * s[:, :, None, None]


def published_cbam(block, x):
    """Equations 1 to 3 of arXiv:1807.06521, in the order of the released code."""
    first, _, last = block.channel.mlp

    def mlp(v):
        hidden = F.relu(F.linear(v, first.weight[:, :, 0, 0], first.bias))
        return F.linear(hidden, last.weight[:, :, 0, 0], last.bias)

    pooled = mlp(F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0])
    pooled = pooled + mlp(F.adaptive_max_pool2d(x, 1)[:, :, 0, 0])
    x1 = x * torch.sigmoid(pooled)[:, :, None, None]
    both = torch.stack((x1.max(1).values, x1.mean(1)), 1)
    norm = block.spatial.map.norm
    logits = F.conv2d(both, block.spatial.map.conv.weight, padding=3)
    logits = F.batch_norm(logits, norm.running_mean, norm.running_var, norm.weight, norm.bias)
    return x1 * torch.sigmoid(logits)


def published_sk(block, x):
    """Equations 1 to 6 of arXiv:1903.06586, with x itself as the first branch."""
    conv, norm, _ = block.paths[0]
    u1 = F.conv2d(x, conv.weight, padding=2, dilation=2, groups=32)
    u1 = F.relu(F.batch_norm(u1, norm.running_mean, norm.running_var, norm.weight, norm.bias))
    s = (x + u1).mean((2, 3))
    z = F.linear(s, block.squeeze.weight[:, :, 0, 0])
    n = block.norm
    z = F.relu(F.batch_norm(z, n.running_mean, n.running_var, n.weight, n.bias))
    logits = F.linear(z, block.select.weight[:, :, 0, 0]).view(x.shape[0], 2, -1)
    a, b = torch.softmax(logits, 1).unbind(1)
    return a[:, :, None, None] * x + b[:, :, None, None] * u1


def published_gc(block, x):
    """Equation 6 of arXiv:1904.11492."""
    n, c = x.shape[:2]
    flat = x.view(n, c, -1)
    key = block.pool.mask
    alpha = torch.softmax((key.weight.view(1, c) @ flat) + key.bias, 2)
    context = (flat * alpha).sum(2)
    first, norm, _, last = block.fuse[0].transform
    hidden = F.linear(context, first.weight[:, :, 0, 0], first.bias)
    hidden = F.layer_norm(hidden, hidden.shape[1:], norm.weight.view(-1), norm.bias.view(-1))
    return x + F.linear(F.relu(hidden), last.weight[:, :, 0, 0], last.bias)[:, :, None, None]


PUBLISHED = {
    "se": published_se,
    "cbam": published_cbam,
    "sk": published_sk,
    "gc": published_gc,
}


@pytest.mark.parametrize("name", blocks.names())
class TestPublished:
    def test_at_one_it_is_the_published_block(self, name):
        block, x = opened(build(name)), features()
        expected = PUBLISHED[name](block, x)
        # Another order of the same sums: float32 rounding.
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, x, atol=1e-2)

    def test_the_reference_has_teeth(self, name):
        block, x = opened(build(name), 0.9), features()
        assert not torch.allclose(block(x), PUBLISHED[name](block, x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
    def test_at_zero_it_is_nothing(self, name, dtype):
        block, x = build(name).to(dtype), features().to(dtype)
        x[0, 0, 0, 0] = -0.0
        assert torch.equal(block(x), x)
        assert torch.equal(block.train()(x), x)
        last = x.contiguous(memory_format=torch.channels_last)
        assert torch.equal(block(last), x)

    def test_autocast_keeps_the_dtype_of_the_features(self, name):
        x = features()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert build(name)(x).dtype == torch.float32
            assert torch.equal(build(name)(x), x)
            half = x.bfloat16()
            assert build(name)(half).dtype == torch.bfloat16
            assert torch.equal(build(name)(half), half)

    def test_gates_learn_at_once_and_everything_behind_them_next(self, name):
        # Two hidden units, as by default here, could both be off for every image.
        block, x = build(name, reduction=2).train(), features().requires_grad_()
        block(x).square().sum().backward()
        gates = {id(gate) for gate in named_gates(block).values()}
        assert all(
            p.grad is not None and p.grad.any() for p in block.parameters() if id(p) in gates
        )
        torch.optim.SGD(block.parameters(), 1e-3).step()
        block.zero_grad()
        block(x).square().sum().backward()
        silent = [
            n
            for n, p in block.named_parameters()
            if p.grad is None or not p.grad.any() and not _is_shifted_away(name, n)
        ]
        assert silent == []

    def test_any_width_and_size(self, name):
        for channels, size in ((1, 1), (3, 5), (17, 7), (64, 1)):
            block, x = blocks.get(name)(channels), features(channels, 3, size)
            assert torch.equal(block(x), x)
            assert opened(block)(x).shape == x.shape


def _is_shifted_away(name, parameter):
    """A constant added to all logits of a softmax changes nothing: its gradient is exactly 0."""
    return name == "gc" and parameter == "pool.mask.bias"


OPTIONS = [
    ("se", {"reduction": 4}),
    ("se", {"ratio": 0.25}),
    ("se", {"bias": False}),
    ("se", {"activation": "silu"}),
    ("se", {"scale_activation": "hardsigmoid"}),
    ("cbam", {"reduction": 4}),
    ("cbam", {"ratio": 0.25}),
    ("cbam", {"pool_types": ("avg",)}),
    ("cbam", {"pool_types": ("max", "lp")}),
    ("cbam", {"pool_types": ("lse",)}),
    ("cbam", {"no_spatial": True}),
    ("cbam", {"kernel_size": 3}),
    ("sk", {"branches": 3}),
    ("sk", {"groups": 8}),
    ("sk", {"reduction": 2, "min_width": 1}),
    ("sk", {"min_width": 8}),
    ("sk", {"dilated": False}),
    ("sk", {"dense": True}),
    ("sk", {"norm": "layer"}),
    ("gc", {"reduction": 4}),
    ("gc", {"ratio": 0.25}),
    ("gc", {"pooling": "avg"}),
    ("gc", {"fusion": ("channel_mul",)}),
    ("gc", {"fusion": ("channel_mul", "channel_add")}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_option_changes_something(name, options):
    x = features()
    # Two hidden units, as by default at this width, could both be off for every image.
    wide = {} if name == "sk" else {"reduction": 2}
    plain, changed = build(name, **wide), build(name, **{**wide, **options})
    assert torch.equal(changed(x), x)
    assert not torch.allclose(opened(changed)(x), opened(plain)(x), atol=1e-4)
    assert torch.equal(make_torchscript(changed, (x,))(x), changed(x))


def test_no_option_is_left_out():
    tried = {(name, option) for name, options in OPTIONS for option in options}
    assert tried == {(name, o) for name in blocks.names() for o in blocks.option_types(name)}


@pytest.mark.parametrize(
    ("name", "option", "value", "error"),
    [
        ("se", "reduction", "0", BadOption),
        ("se", "reduction", "2.5", BadOption),
        ("se", "ratio", "0", BadOption),
        ("se", "ratio", "nan", BadOption),
        ("se", "ratio", "1/0", BadOption),
        ("se", "bias", "maybe", BadOption),
        ("se", "activation", "swish", BadOption),
        ("se", "reductoin", "8", UnknownName),
        ("cbam", "kernel_size", "4", BadOption),
        ("cbam", "pool_types", "avg,avg", BadOption),
        ("cbam", "pool_types", "mean", BadOption),
        ("sk", "branches", "1", BadOption),
        ("sk", "groups", "0", BadOption),
        ("sk", "norm", "group", BadOption),
        ("sk", "stride", "2", UnknownName),
        ("gc", "pooling", "max", BadOption),
        ("gc", "fusion", "", BadOption),
    ],
)
def test_a_bad_option_is_refused(name, option, value, error):
    with pytest.raises(error, match=option if error is BadOption else "option"):
        blocks.get(name)(CHANNELS, **blocks.check_options(name, {option: value}))


def test_options_are_read_from_text():
    read = blocks.check_options("gc", {"ratio": "1/4", "fusion": "channel_mul,channel_add"})
    assert read == {"ratio": 0.25, "fusion": ("channel_mul", "channel_add")}
    assert blocks.check_options("se", {"bias": "false", "reduction": "8"}) == {
        "bias": False,
        "reduction": 8,
    }


class TestGate:
    def test_exact_ends(self):
        gate, a, x = Gate(), torch.rand(2, 8, 1, 1), features(8)
        assert torch.equal(gate(a, x), torch.ones_like(a))
        nn.init.ones_(gate.openness)
        assert torch.equal(gate(a, x), a)

    def test_one_number_that_fsdp_takes(self):
        assert Gate().openness.shape == (1,)

    def test_infinite_features_stay(self):
        x = features()
        x[0, 0, 0, 0] = float("inf")
        assert torch.equal(x * Gate()(torch.rand(2, CHANNELS, 1, 1), x), x)

    def test_the_map_is_cast_to_the_features(self):
        mixed = Gate()(torch.rand(2, 8, 1, 1), features(8).half())
        assert mixed.dtype == torch.float16


class TestSelectiveKernel:
    def test_a_batch_of_one_says_what_to_do(self):
        block = build("sk").train()
        with pytest.raises(AssertionError, match="norm=layer"):
            block(features(batch=1))
        assert build("sk", norm="layer").train()(features(batch=1)).shape == (1, CHANNELS, 8, 8)

    def test_its_norm_counts_as_batchnorm_does(self):
        block, reference = build("sk").train(), nn.BatchNorm2d(32).train()
        x = torch.randn(4, 32, 1, 1)
        reference.load_state_dict(block.norm.state_dict())
        assert torch.equal(block.norm(x), reference(x))
        assert all(
            torch.equal(a, b)
            for a, b in zip(block.norm.buffers(), reference.buffers(), strict=True)
        )

    def test_half_precision_does_not_overflow(self):
        block = opened(build("sk")).half()
        x = torch.full((1, CHANNELS, 4, 4), 40000.0, dtype=torch.float16)
        assert block(x).isfinite().all()


def test_scripting_and_copies_agree():
    for name in blocks.names():
        block, x = opened(build(name), 0.5), features()
        assert torch.equal(make_torchscript(block, (x,))(x), block(x))
        assert torch.equal(copy.deepcopy(block)(x), block(x))

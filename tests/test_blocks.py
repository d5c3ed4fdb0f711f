"""Each block is the published one at gate 1, nothing at gate 0, and every option does something."""

import copy

import pytest
import torch
from torch import nn

from attnsurgeon import blocks
from attnsurgeon.errors import BadOption, UnknownName
from attnsurgeon.export.torchscript import make_torchscript
from attnsurgeon.gate import Gate, named_gates
from tests.published import FORMS, PUBLISHED

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


def settled(block):
    """Give norms statistics and weights of their own, as training would."""
    generator = torch.Generator().manual_seed(11)
    for module in block.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in module.state_dict().values():
                if tensor.is_floating_point():
                    tensor.copy_(0.5 + torch.rand(tensor.shape, generator=generator))
    return block


def test_every_block_is_held_against_its_paper():
    assert sorted(PUBLISHED) == blocks.names()


@pytest.mark.parametrize(("name", "options"), FORMS)
class TestPublished:
    def test_at_one_it_is_the_published_block(self, name, options):
        block, x = settled(opened(build(name, **options))), features()
        expected = PUBLISHED[name](block, x, **options)
        # Another order of the same sums: float32 rounding.
        torch.testing.assert_close(block(x), expected, rtol=1e-5, atol=1e-5)
        assert not torch.allclose(expected, x, atol=1e-2)

    def test_the_reference_has_teeth(self, name, options):
        block, x = settled(opened(build(name, **options), 0.9)), features()
        expected = PUBLISHED[name](block, x, **options)
        assert not torch.allclose(block(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("name", "options"), FORMS)
@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 3e4), (torch.bfloat16, 1e12), (torch.float32, 1e15)]
)
def test_a_closed_map_of_large_features_is_no_nan(name, options, dtype, size):
    x = (features() / 3 * size).clamp(-2 * size, 2 * size).to(dtype)
    assert x.isfinite().all()
    block = build(name, **options).to(dtype)
    assert torch.equal(block(x), x)
    assert torch.equal(block(x.abs()), x.abs())


def wide(name, **options):
    """Two hidden units, as by default at this width, could both be off for every image."""
    takes = "reduction" in blocks.option_types(name) and name != "sk"
    return build(name, **{**({"reduction": 2} if takes else {}), **options})


@pytest.mark.parametrize("name", blocks.names())
class TestEveryBlock:
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
        block, x = wide(name).train(), features().requires_grad_()
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
    return (name, parameter) in {("gc", "pool.mask.bias"), ("snl", "pool.mask.bias")}


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
    ("snl", {"bias": False}),
    ("nonlocal", {"reduction": 4}),
    ("nonlocal", {"ratio": 0.25}),
    ("nonlocal", {"pairwise": "dot_product"}),
    ("nonlocal", {"subsample": True}),
    ("nonlocal", {"norm": True}),
    ("eca", {"kernel_size": 5}),
    ("eca", {"gamma": 1.0}),
    ("eca", {"beta": 3.0}),
    ("ese", {"bias": False}),
    ("ese", {"scale_activation": "hardsigmoid"}),
    ("bam", {"reduction": 4}),
    ("bam", {"ratio": 0.25}),
    ("bam", {"dilation": 2}),
    ("bam", {"form": "released"}),
    ("bam", {"norm": "layer"}),
    ("scse", {"reduction": 4}),
    ("scse", {"ratio": 0.25}),
    ("scse", {"fusion": "max"}),
    ("ge", {"extent": 4}),
    ("ge", {"extra_params": True}),
    ("ge", {"mlp": False}),
    ("ge", {"reduction": 4}),
    ("ge", {"ratio": 0.25}),
    ("coord", {"reduction": 4, "min_width": 4}),
    ("coord", {"ratio": 0.25}),
    ("coord", {"min_width": 20}),
    ("coord", {"activation": "relu"}),
    ("simam", {"regularizer": 0.5}),
    ("triplet", {"kernel_size": 3}),
    ("triplet", {"no_spatial": True}),
]


@pytest.mark.parametrize(("name", "options"), OPTIONS)
def test_every_option_changes_something(name, options):
    x = features()
    base = {"extent": 2} if "extra_params" in options else {"mlp": True} if name == "ge" else {}
    plain, changed = wide(name, **base), wide(name, **{**base, **options})
    assert torch.equal(changed(x), x)
    settled(changed), settled(plain)
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
        ("snl", "reduction", "4", UnknownName),
        ("nonlocal", "pairwise", "gaussian", BadOption),
        ("nonlocal", "reduction", "0", BadOption),
        ("eca", "kernel_size", "2", BadOption),
        ("eca", "gamma", "0", BadOption),
        ("eca", "beta", "inf", BadOption),
        ("ese", "scale_activation", "tanh", BadOption),
        ("bam", "dilation", "0", BadOption),
        ("bam", "form", "official", BadOption),
        ("bam", "norm", "group", BadOption),
        ("scse", "fusion", "mean", BadOption),
        ("ge", "extent", "3", BadOption),
        ("ge", "extra_params", "true", BadOption),
        ("coord", "min_width", "0", BadOption),
        ("coord", "activation", "swish", BadOption),
        ("simam", "regularizer", "0", BadOption),
        ("triplet", "kernel_size", "6", BadOption),
        ("triplet", "dims", "3", UnknownName),
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


def test_squares_that_overflow_are_no_nan():
    block, x = build("simam"), features() * 1e25
    assert torch.equal(block(x), x)
    assert opened(block)(x).isfinite().all()


def test_each_half_of_scse_can_be_opened_alone():
    block, x = build("scse"), features()
    nn.init.ones_(block.channel_gate.openness)
    channel = block.channel(x.mean((2, 3), keepdim=True))
    assert torch.equal(block(x), x * channel)
    nn.init.zeros_(block.channel_gate.openness)
    nn.init.ones_(block.spatial_gate.openness)
    assert torch.equal(block(x), x * block.spatial(x))


@pytest.mark.parametrize(
    ("channels", "k"), [(1, 1), (8, 3), (64, 3), (128, 5), (256, 5), (2048, 7)]
)
def test_the_kernel_of_eca_grows_with_the_width(channels, k):
    assert blocks.get("eca")(channels).conv.kernel_size == (k, 1)


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

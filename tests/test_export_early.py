"""Attention reads the map before a widening 1x1 convolution; what cannot be moved stays."""

import copy

import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.export import early
from attnsurgeon.export.early import read_early
from attnsurgeon.export.fold import fold_norms
from attnsurgeon.gate import named_gates

IMAGE = torch.randn(2, 8, 6, 5, generator=torch.Generator().manual_seed(0))


class Bottleneck(nn.Module):
    """Adds a branch that ends in a 1x1 convolution from 4 to 16 channels."""

    def __init__(self):
        super().__init__()
        self.reduce, self.widen = nn.Conv2d(16, 4, 3, padding=1), nn.Conv2d(4, 16, 1, bias=False)
        self.norm = nn.BatchNorm2d(16)

    def forward(self, x):
        return torch.relu(self.norm(self.widen(torch.relu(self.reduce(x)))) + x)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block = nn.Conv2d(8, 16, 1), Bottleneck()

    def forward(self, x):
        return self.block(self.stem(x))


def operated(block):
    torch.manual_seed(0)
    host = Net().eval()
    nn.init.uniform_(host.block.norm.running_var, 0.5, 2.0)
    nn.init.normal_(host.block.norm.bias)
    model = attnsurgeon.insert_attention(
        host, block, placement="standard", example=IMAGE, reduction=4
    ).eval()
    for gate in named_gates(model).values():
        nn.init.constant_(gate, 0.7)
    return model


def rewritten(model):
    with torch.no_grad():
        program = torch.export.export(model, (IMAGE,))
    fold_norms(program)
    return program, read_early(program)


def difference(program, model):
    with torch.no_grad():
        return (program.module()(IMAGE) - model(IMAGE)).abs().max().item()


@pytest.mark.parametrize(("block", "readers"), [("se", 1), ("gc", 2), ("cbam", 0)])
def test_readers_move_and_nothing_else_changes(block, readers):
    model = operated(block)
    before = copy.deepcopy(model.state_dict())
    program, moved = rewritten(model)
    assert moved == readers
    assert difference(program, model) < 1e-5
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize("block", ["se", "gc"])
def test_less_is_read_and_kept(block):
    model = operated(block)
    program, _ = rewritten(model)
    summaries = (torch.ops.aten.mean.dim, torch.ops.aten.flatten.using_ints)
    read = [node.args[0] for node in program.graph.nodes if node.target in summaries]
    channels = {node.meta["val"].shape[1] for node in read}
    assert channels == ({4} if block == "se" else {4, 1})  # 1 is the mask of GC
    kept = sum(tensor.numel() for tensor in program.state_dict.values())
    assert kept < sum(tensor.numel() for tensor in model.state_dict().values())
    for node in program.graph.nodes:  # what the file says of shapes is what they are
        if node.target is torch.ops.aten.conv2d.default:
            assert node.args[1].meta["val"].shape[1] == node.args[0].meta["val"].shape[1]


@pytest.mark.parametrize("block", ["se", "gc"])
def test_a_forgotten_bias_would_be_seen(block, monkeypatch):
    model = operated(block)
    replace = early._replace
    monkeypatch.setattr(
        early, "_replace", lambda s, n, v: replace(s, n, v if v.ndim == 4 else s[n].double())
    )
    program, _ = rewritten(model)
    seen = difference(program, model)
    # A number added to all logits of a softmax changes nothing, one before a hidden layer does.
    assert seen > 1e-3


class Reading(nn.Module):
    """Everything that must stay: other axes, other convolutions, weights that others read."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        narrow = kind == "narrowing"
        self.register_buffer("fixed", torch.ones(16, 8, 1, 1), persistent=False)
        self.conv = nn.Conv2d(8, 4 if narrow else 16, 1, stride=2 if kind == "strided" else 1)
        self.read = nn.Conv2d(4 if narrow else 16, 3, 1, bias=kind != "no bias")

    def forward(self, x):
        y = self.conv(x)
        match self.kind:
            case "one axis":
                return self.read(y.mean([2], keepdim=True)), y
            case "read by two":
                mean = y.mean([2, 3], keepdim=True)
                return self.read(mean) + mean.sum(), y
            case "shared reader":
                return self.read(y.mean([2, 3], keepdim=True)) + self.read(y), y
            case "maximum":
                return self.read(y.amax([2, 3], keepdim=True)), y
            case "not a softmax":
                weights = torch.sigmoid(y[:, :1].flatten(2)).transpose(1, 2)
                return self.read(torch.matmul(y.flatten(2), weights).unsqueeze(3)), y
            case "input changes":
                z = x.sin()
                y = self.conv(z)
                z.mul_(3)
                return self.read(y.mean([2, 3], keepdim=True)), y, z
            case "weights that are not saved":
                y = nn.functional.conv2d(x, self.fixed)
                return self.read(y.mean([2, 3], keepdim=True)), y
            case "alone":
                return self.read(y.mean([2, 3], keepdim=True))
        return self.read(y.mean([2, 3], keepdim=True)), y


KINDS = ["one axis", "read by two", "shared reader", "maximum", "not a softmax", "alone"]
KINDS += ["input changes", "weights that are not saved"]


@pytest.mark.parametrize("kind", [*KINDS, "narrowing", "strided", "no bias"])
def test_what_cannot_be_moved_stays(kind):
    program, moved = rewritten(Reading(kind).eval())
    assert moved == 0


def test_the_plain_case_beside_them_moves():
    model = Reading("plain").eval()
    program, moved = rewritten(model)
    assert moved == 1
    with torch.no_grad():
        for found, wanted in zip(program.module()(IMAGE), model(IMAGE), strict=True):
            torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("gate", ["read.weight", "read.bias", "conv.weight"])
def test_what_is_a_gate_stays(gate):
    model = Reading("plain").eval()
    with torch.no_grad():
        program = torch.export.export(model, (IMAGE,))
    assert read_early(program, {gate}) == 0
    assert torch.equal(program.state_dict["read.weight"], model.read.weight)

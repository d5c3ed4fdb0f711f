"""Attention is added into the map that it joins, where that map is read by nobody any more."""

from collections import Counter

import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.export import in_place
from attnsurgeon.export.in_place import reuse_maps
from attnsurgeon.export.torchscript import freeze_torchscript, load_torchscript
from tests.test_export_early import IMAGE

ATEN = torch.ops.aten


class Sum(nn.Module):
    """A map x, a sum that might be written into it, and who else would see that."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.conv, self.other = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

    def forward(self, image):
        x, y = self.conv(image), self.other(image)
        scale = y.mean([2, 3], keepdim=True)
        match self.kind:
            case "the user's":
                return torch.addcmul(image, y, scale)
            case "read later":
                return torch.addcmul(x, y, scale) * x
            case "returned":
                return torch.addcmul(x, y, scale), x
            case "seen through a view":
                view = x.flatten(2)
                return torch.addcmul(x, y, scale).sum() + view.mean([2])
            case "seen through a view before":
                pooled = x.flatten(2).transpose(1, 2).mean([1])
                return torch.addcmul(x, y, scale) + pooled[..., None, None]
            case "perhaps the input":
                return torch.addcmul(torch.dropout(image, 0.5, False), y, scale)
            case "held by what is not known":
                held = x.contiguous()
                return torch.addcmul(x, y, scale).sum() + held
            case "of another size":
                return torch.addcmul(scale, y, scale)
            case "sum read later":
                total = torch.addcmul(x, y, scale)
                return torch.relu(total) * total
            case "a vector joins":
                return torch.relu(x + scale)
            case "a vector joins the user's":
                return image + scale
            case "of two maps":
                return torch.relu(x + y)
            case "joins what was written":
                return torch.relu(y + (x + scale)).mul(2)
            case "other arithmetic":
                return torch.add(x, scale, alpha=2) + (x + 1.5)
            case "scaled":
                return torch.relu(x * scale + y)
            case "scaled by a map of pixels":
                return x * y.mean(1, keepdim=True)
            case "scaled and read later":
                return x * scale + x
            case "read in another order":
                square = self.conv(image[..., :5, :])
                return torch.addcmul(square, square.transpose(2, 3), scale)
            case "changed through a view":
                seen = x.flatten(2).clamp_min_(0)
                return (x * scale).sum() + seen
            case "written into by name":
                view = x.flatten(2)
                torch.mul(y, y, out=x)
                return (x * scale).sum() + view
            case "the user's sum":
                y += x * scale
                return torch.relu(y)
            case "the user's sum seen through a view":
                view = y.flatten(2)
                y += x * scale
                return y.sum() + view
            case "read before":
                x.mul(2).sum()
        return torch.relu(torch.addcmul(x, y, scale))


def program_of(model):
    with torch.no_grad():
        return torch.export.export(model, (IMAGE.clone(),))


def outputs(program, model):
    with torch.no_grad():
        given = IMAGE.clone()
        found = program.module()(given), model(IMAGE.clone())
    assert torch.equal(given, IMAGE)  # it is the user's
    return found


STAY = ["the user's", "read later", "returned", "seen through a view", "perhaps the input"]
STAY += ["held by what is not known", "of another size", "a vector joins the user's"]
STAY += ["of two maps", "other arithmetic", "scaled and read later", "read in another order"]
STAY += ["changed through a view", "written into by name"]
USED = {
    "seen through a view before": 2,
    "sum read later": 1,
    "a vector joins": 2,
    "joins what was written": 3,
    "scaled": 3,
    "the user's sum": 3,
    "the user's sum seen through a view": 1,
}
USED |= {"scaled by a map of pixels": 1, "read before": 2, "plain": 2}


@pytest.mark.parametrize(("kind", "count"), [*((kind, 0) for kind in STAY), *USED.items()])
def test_a_map_is_written_into_where_nobody_sees_it(kind, count):
    model = Sum(kind).eval()
    program = program_of(model)
    assert reuse_maps(program) == count
    torch.testing.assert_close(*outputs(program, model), rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["read later", "the user's", "scaled and read later"])
def test_a_map_that_is_seen_would_be_noticed(kind, monkeypatch):
    monkeypatch.setattr(in_place, "_is_free", lambda held, writer: True)
    program = program_of(Sum(kind).eval())
    reuse_maps(program)
    with pytest.raises(AssertionError):
        torch.testing.assert_close(*outputs(program, Sum(kind).eval()))


class Blocks(nn.Module):
    """Residual blocks one after the other: each adds into the map of the one before."""

    def __init__(self, count=3):
        super().__init__()
        self.stem = nn.Conv2d(8, 8, 1)
        self.blocks = nn.ModuleList([Block() for _ in range(count)])

    def forward(self, x):
        x = torch.relu(self.stem(x))
        for block in self.blocks:
            x = block(x)
        return x


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)

    def forward(self, x):
        return torch.relu(self.norm(self.conv(x)) + x)


@pytest.mark.parametrize(
    ("block", "kinds"),
    [
        ("se", {"addcmul_": 3, "clamp_min_": 3}),
        ("cbam", {"addcmul_": 3, "clamp_min_": 3}),
        ("gc", {"sub_": 6, "clamp_min_": 3}),
    ],
)
def test_frozen_files_add_into_the_map_before(block, kinds, tmp_path):
    torch.manual_seed(0)
    model = attnsurgeon.insert_attention(
        Blocks().eval(), block, placement="standard", example=IMAGE, reduction=4
    )
    path = tmp_path / "x.pt"
    artifact = attnsurgeon.export_model(model, path, example=IMAGE, optimize=True)
    assert {check.gates for check in artifact.checks} >= {"closed", "open"}
    assert all(check.passed for check in artifact.checks)
    script = load_torchscript(path)[0]
    with torch.no_grad():
        optimised = freeze_torchscript(script)
        given = IMAGE.clone()
        first, second = optimised(given), optimised(given)
    assert torch.equal(given, IMAGE)
    assert torch.equal(first, second)
    found = Counter(node.kind().removeprefix("aten::") for node in optimised.inlined_graph.nodes())
    assert found & Counter(kinds) == Counter(kinds)

"""Sequences that networks walk, slice, count and index: served exactly, or refused before."""

import copy
import pickle

import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.errors import PlacementUnavailable
from attnsurgeon.sites import find_sites
from tests import exports

EXAMPLE = torch.zeros(1, 3, 16, 16)


class Walker(nn.Sequential):
    """Walks its own children in one of several ways, and adds what it was given."""

    ways = ("iterates", "indexes", "slices")

    def forward(self, x):
        y = x
        if self.way == "iterates":
            for layer in self:
                y = layer(y)
        elif self.way == "indexes":
            for i in range(len(self)):
                y = self[i - len(self)](y)
        else:
            for layer in self[:-1]:
                y = layer(y)
            y = self[-1](y)
        return x + y


class Net(nn.Module):
    """One sequence, which `run` takes as it likes."""

    def __init__(self, features, run):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.features = features
        self.run = run
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.run(self.features, self.stem(x)).mean((2, 3)))


def called(features, x):
    return features(x)


def walked(features, x):
    for layer in features:
        x = layer(x)
    return x


def conv():
    return nn.Conv2d(8, 8, 3, padding=1)


@pytest.mark.parametrize("placement", ["post", "standard"])
@pytest.mark.parametrize("way", Walker.ways)
def test_a_sequence_that_walks_itself_does_not_see_its_attention(way, placement):
    torch.manual_seed(0)
    features = Walker(conv(), nn.ReLU(), conv())
    features.way = way
    host = Net(features, called).eval()
    image = torch.randn(2, 3, 16, 16)
    operated = attnsurgeon.insert_attention(
        host, "se", example=EXAMPLE, placement=placement, reduction=4
    )
    inside = operated.features
    assert len(inside) == 3
    assert list(inside) == [inside[0], inside[1], inside[-1]]
    assert type(inside[:2]) is Walker
    for twin in (operated, copy.deepcopy(operated), pickle.loads(pickle.dumps(operated))):
        assert torch.equal(twin(image), host(image))
    with torch.no_grad():
        next(iter(attnsurgeon.gates(operated).values())).fill_(1)
        attended = inside.get_submodule(f"attention_{placement}")
        plain = host.stem(image)
        branch = host.features(plain) - plain
        wanted = attended(plain + branch) if placement == "post" else plain + attended(branch)
        torch.testing.assert_close(inside(plain), wanted)
    bare = attnsurgeon.remove_attention(operated)
    assert type(bare.features) is Walker
    assert bare.state_dict().keys() == host.state_dict().keys()


def test_the_modules_of_a_sequence_that_the_network_walks():
    host = Net(nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU()), walked).eval()
    operated = attnsurgeon.insert_attention(
        host, "se", example=EXAMPLE, at="features.3", reduction=4
    )
    assert torch.equal(operated(EXAMPLE + 1), host(EXAMPLE + 1))
    says = "features is not run itself in eval mode; name one in it that is, such as features.3"
    with pytest.raises(PlacementUnavailable, match=says):
        attnsurgeon.insert_attention(host, "se", example=EXAMPLE, at="features")


@pytest.mark.parametrize(
    "run",
    [
        lambda features, x: features(x) + walked(features, x),
        lambda features, x: features(x) * len(features),
        lambda features, x: features(x) + features[-1].conv.bias.sum(),
        lambda features, x: features(x) + walked(features[1:], x),
    ],
)
def test_a_sequence_that_is_called_and_taken_apart_too(run):
    host = Net(nn.Sequential(exports.Block(8), exports.Block(8)), run).eval()
    host.features[1].conv.bias = nn.Parameter(torch.ones(8))
    reason = "counts, slices or runs one by one as well; name its last module"
    (site,) = (s for s in find_sites(host, EXAMPLE, named=["features"]) if s.path == "features")
    assert reason in site.refused["post"]
    with pytest.raises(PlacementUnavailable, match=reason):
        attnsurgeon.insert_attention(host, "se", example=EXAMPLE, at="features", reduction=4)
    assert len(attnsurgeon.gates(attnsurgeon.insert_attention(host, "se", example=EXAMPLE))) == 2


def test_reading_a_module_of_a_sequence_from_its_front_does_no_harm():
    def typed(features, x):
        return features(x.to(features[0].conv.weight.dtype))

    host = Net(nn.Sequential(exports.Block(8), exports.Block(8)), typed).eval()
    operated = attnsurgeon.insert_attention(host, "se", example=EXAMPLE, at="features")
    assert torch.equal(operated(EXAMPLE + 1), host(EXAMPLE + 1))


def test_what_is_noticed_is_given_back():
    before = dict(vars(nn.Sequential))
    find_sites(exports.Tiny().eval(), torch.zeros(1, 3, 32, 32))
    assert dict(vars(nn.Sequential)) == before

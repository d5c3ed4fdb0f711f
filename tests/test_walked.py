"""Sequences that networks walk, slice, count and index: served exactly, or refused before."""

import copy
import pickle

import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.errors import IdentityBroken, PlacementUnavailable
from attnsurgeon.plan import make_plan
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


def taps(features, x):
    found = []
    for layer in features:
        x = layer(x)
        found.append(x)
    return found[1]


def test_layers_that_nothing_is_computed_from_are_left_out_with_the_reason():
    host = Net(nn.Sequential(conv(), nn.ReLU(), conv(), nn.ReLU()), taps).eval()
    sites = find_sites(host, EXAMPLE, named=["features.*"])
    assert [site.path for site in sites if not site.refused] == ["features.0", "features.1"]
    plan = make_plan(host, sites, "se", at="features.*", kind="layer")
    assert set(plan.skipped) == {"features.2", "features.3"}
    assert "no output of the network is computed from it" in plan.skipped["features.3"]
    where = {"at": "features.*", "kind": "layer", "example": EXAMPLE}
    assert len(attnsurgeon.gates(attnsurgeon.insert_attention(host, "se", **where))) == 2
    with pytest.raises(IdentityBroken, match=r"give --exclude 'features\.2' 'features\.3' or"):
        attnsurgeon.insert_attention(host, "se", at=["features.2", "features.3"], example=EXAMPLE)


class Opaque(Net):
    """Returns its map inside of something that nobody can look into."""

    def forward(self, x):
        return Held(self.features(self.stem(x)))


class Held:
    def __init__(self, held):
        self.held = held


class Written(Net):
    """Writes its map part by part."""

    def forward(self, x):
        y = self.features(self.stem(x))
        held = torch.zeros_like(y)
        held[:, :4] = y[:, :4]
        held[:, 4:] = self.stem(x)[:, 4:]
        return held


@pytest.mark.parametrize("kind", [Opaque, Written])
def test_what_cannot_be_followed_is_not_left_out(kind):
    host = kind(nn.Sequential(conv(), nn.ReLU()), called).eval()
    sites = find_sites(host, EXAMPLE, named=["features.*"])
    assert len(sites) == 2
    assert not any(site.refused for site in sites)


def test_what_is_noticed_is_given_back():
    before = dict(vars(nn.Sequential))
    find_sites(exports.Tiny().eval(), torch.zeros(1, 3, 32, 32))
    assert dict(vars(nn.Sequential)) == before

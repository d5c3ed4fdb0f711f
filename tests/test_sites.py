"""Sites are observed: in networks nobody listed, with everything lent given back."""

import copy
import dataclasses
import re
import types

import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon.errors import (
    HostUnusable,
    NoSites,
    PatternUnmatched,
    PlacementUnavailable,
    UnknownName,
)
from attnsurgeon.host import load_host, load_outline
from attnsurgeon.plan import make_plan
from attnsurgeon.selection import select_sites
from attnsurgeon.sites import find_sites
from attnsurgeon.surgery import attention_paths, cuts_of, is_new_key
from tests import hosts

EXAMPLE = torch.zeros(1, 3, 32, 32)


class OwnBlock(nn.Module):
    """A pre-activation block with names nobody knows, functional activations, scaled residual."""

    def __init__(self, width, stride=1):
        super().__init__()
        self.n1, self.n2 = nn.BatchNorm2d(width), nn.GroupNorm(4, 2 * width)
        self.spread = nn.Conv2d(width, 2 * width, 3, stride, 1)
        self.narrow = nn.Conv2d(2 * width, 2 * width if stride > 1 else width, 1)
        self.short = nn.Conv2d(width, 2 * width, 1, stride) if stride > 1 else None

    def forward(self, features):
        inner = torch.relu(self.n1(features))
        inner = torch.nn.functional.gelu(self.n2(self.spread(inner)))
        skip = features if self.short is None else self.short(features)
        return skip + 0.5 * self.narrow(inner)


class OwnNet(nn.Module):
    def __init__(self, channels=3, block=OwnBlock):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.trunk = nn.Sequential(block(8), block(8, 2), block(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(self.trunk(self.stem(x)).mean((2, 3)))


class Opaque(OwnBlock):
    """A block whose forward cannot be traced: it looks at numbers."""

    def forward(self, features):
        if features.shape[0] > 0 and float(features.shape[1]) == len(self.n1.weight):
            pass
        return super().forward(features)


class TwoFaced(OwnBlock):
    """A block that computes something else in training."""

    def forward(self, features):
        out = super().forward(features)
        return torch.dropout(out, 0.5, self.training)


def test_own_network():
    torch.manual_seed(0)
    sites = find_sites(OwnNet(), EXAMPLE)
    assert [(s.path, s.channels, s.shape, s.stage) for s in sites] == [
        ("trunk.0", 8, (1, 8, 32, 32), 1),
        ("trunk.1", 16, (1, 16, 16, 16), 2),
        ("trunk.2", 16, (1, 16, 16, 16), 2),
    ]
    assert {s.kind for s in sites} == {"residual"}
    assert {s.layout for s in sites} == {"NCHW"}
    assert all(len(s.placements) == 6 for s in sites)
    narrow = sites[1].spots["replace"]
    assert (narrow.place.channels, narrow.place.in_channels, narrow.place.stride) == (16, 8, (2, 2))


@pytest.mark.parametrize("placement", ["post", "standard", "pre", "identity", "conv", "replace"])
def test_own_network_is_operated_on_exactly(placement):
    torch.manual_seed(0)
    host = OwnNet().eval()
    block = "sk" if placement == "replace" else "gc"
    operated = attnsurgeon.insert_attention(host, block, placement=placement, example=EXAMPLE)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(operated(image), host(image))
    for gate in attnsurgeon.gates(operated).values():
        gate.data.fill_(0.7)
    assert not torch.equal(operated(image), host(image))
    assert isinstance(operated.trunk[0], OwnBlock)


def placed(operated, image, path="trunk.0"):
    """Return what the attention at a block read, and what the block's own children returned."""
    seen = {}

    def remember(name):
        def hook(module, args, out):
            seen[name] = (args, out)

        return hook

    for name, module in operated.get_submodule(path).named_modules():
        module.register_forward_hook(remember(name))
    with torch.no_grad():
        operated(image)
    return seen


def test_each_placement_reads_what_its_name_says():
    torch.manual_seed(0)
    host = OwnNet().eval()
    image = torch.randn(2, 3, 32, 32)

    def at(placement):
        block = "sk" if placement == "replace" else "se"
        operated = attnsurgeon.insert_attention(host, block, placement=placement, example=EXAMPLE)
        seen = placed(operated, image)
        block_in, block_out = seen[""][0][0], seen[""][1]
        return seen[f"attention_{placement}"][0], seen, block_in, block_out

    reads, seen, entry, out = at("post")
    assert torch.equal(reads[0], out)
    reads, seen, entry, out = at("standard")
    assert torch.equal(reads[0], 0.5 * seen["narrow"][1])
    reads, seen, entry, out = at("pre")
    assert torch.equal(reads[0], entry)
    assert torch.equal(seen["n1"][0][0], entry)
    reads, seen, entry, out = at("identity")
    assert torch.equal(reads[0], entry)
    reads, seen, entry, out = at("conv")
    assert torch.equal(reads[0], seen["narrow"][0][0])
    reads, seen, entry, out = at("replace")
    assert torch.equal(reads[0], seen["spread"][0][0])
    assert torch.equal(reads[1], seen["narrow"][0][0])


def test_placements_scale_what_they_should():
    """Opened gates: `pre` leaves the shortcut alone, `identity` leaves the branch alone."""
    torch.manual_seed(0)
    host = OwnNet().eval()
    image = torch.randn(2, 3, 32, 32)
    for placement in ("pre", "identity"):
        operated = attnsurgeon.insert_attention(
            host, "se", placement=placement, at="trunk.0", example=EXAMPLE
        )
        next(iter(attnsurgeon.gates(operated).values())).data.fill_(1.0)
        plain, seen = placed(host, image), placed(operated, image)
        entry, scaled = seen[""][0][0], seen[f"attention_{placement}"][1]
        branch = 0.5 * seen["narrow"][1]
        if placement == "pre":
            assert torch.equal(seen["n1"][0][0], scaled)
            assert torch.equal(seen[""][1], entry + branch)
        else:
            assert torch.equal(seen["narrow"][1], plain["narrow"][1])
            assert torch.equal(seen[""][1], scaled + branch)


def test_a_forward_that_cannot_be_traced_still_takes_post():
    torch.manual_seed(0)
    host = OwnNet(block=Opaque).eval()
    sites = find_sites(host, EXAMPLE)
    assert {s.placements for s in sites} == {("post",)}
    assert all("cannot be traced" in s.refused["standard"] for s in sites)
    operated = attnsurgeon.insert_attention(host, "cbam", example=EXAMPLE)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.deepcopy(operated)(image), host(image))
    with pytest.raises(PlacementUnavailable, match="cannot be traced"):
        attnsurgeon.insert_attention(host, "se", placement="standard", example=EXAMPLE)


def test_a_forward_that_differs_in_training_is_refused_inside():
    sites = find_sites(OwnNet(block=TwoFaced), EXAMPLE)
    assert {s.placements for s in sites} == {("post",)}
    assert all("train and eval" in s.refused["conv"] for s in sites)


def test_everything_lent_is_given_back():
    host = OwnNet().train()
    host.trunk[1].eval()
    host.trunk[0].n1.register_forward_hook(lambda *args: None)
    before = {
        "modes": [m.training for m in host.modules()],
        "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules()],
        "state": {k: t.clone() for k, t in host.state_dict().items()},
        "ids": [id(p) for p in host.parameters()],
        "types": [type(m) for m in host.modules()],
        "random": torch.get_rng_state(),
    }
    attnsurgeon.insert_attention(host, "sk", example=EXAMPLE)
    with pytest.raises(HostUnusable):
        find_sites(host, torch.zeros(1, 4, 8, 8))
    assert before["modes"] == [m.training for m in host.modules()]
    assert before["hooks"] == [
        len(m._forward_hooks) + len(m._forward_pre_hooks) for m in host.modules()
    ]
    assert all(torch.equal(t, before["state"][k]) for k, t in host.state_dict().items())
    assert before["ids"] == [id(p) for p in host.parameters()]
    assert before["types"] == [type(m) for m in host.modules()]
    assert torch.equal(before["random"], torch.get_rng_state())
    assert all(p.grad is None for p in host.parameters())


def test_channels_come_from_the_network():
    assert find_sites(OwnNet(channels=1))[0].shape == (1, 8, 224, 224)


@pytest.mark.parametrize("name", hosts.NAMES)
def test_an_operated_network_shows_its_hosts_sites(name):
    host = hosts.host(name)
    operated = attnsurgeon.insert_attention(host, "se", every=3, example=torch.zeros(1, 3, 64, 64))
    again = find_sites(operated, torch.zeros(1, 3, 64, 64))
    assert again == list(hosts.sites(name))


@pytest.mark.parametrize(
    ("name", "count", "stages"),
    [
        ("resnet18", 8, 4),
        ("resnet50", 16, 4),
        ("resnext50_32x4d", 16, 4),
        ("regnet_x_400mf", 22, 4),
        ("mobilenet_v2", 10, 4),
        ("efficientnet_b0", 9, 4),
        ("convnext_tiny", 18, 4),
    ],
)
def test_known_networks(name, count, stages):
    sites = [site for site in hosts.sites(name) if site.kind == "residual"]
    assert len(sites) == count
    assert sites[-1].stage == stages
    assert [s.stage for s in sites] == sorted(s.stage for s in sites)


def test_every_residual_addition_of_torchvisions_class_is_a_site():
    model = hosts.host("resnet50")
    blocks = [n for n, m in model.named_modules() if type(m).__name__ == "Bottleneck"]
    assert [site.path for site in hosts.sites("resnet50")] == blocks


class TestOtherKinds:
    """Merges, plain blocks, named layers; tokens, channels last, clips."""

    def test_a_size_that_only_an_argument_tells(self):
        vit = load_outline("vit_b_32", arguments={"image_size": 288, "num_classes": 10})
        assert find_sites(vit)[0].shape == (1, 1 + 9 * 9, 768)

    def test_a_sequence_of_tokens(self):
        vit = load_host("vit_b_16", weights="none", arguments={"image_size": 32})
        sites = find_sites(vit)
        assert {(s.kind, s.layout, s.shape) for s in sites} == {("residual", "NLC", (1, 5, 768))}
        assert all({"se", "gc"} <= set(s.blocks) for s in sites[:-1])
        assert not {"cbam", "sk"} & {name for s in sites for name in s.blocks}
        assert "class token" in sites[-1].refused["post"]
        with pytest.raises(PlacementUnavailable, match="cbam cannot serve .* NLC"):
            make_plan(vit, sites, "cbam")

    def test_class_tokens_are_left_alone(self):
        vit = load_host("vit_b_16", weights="none", arguments={"image_size": 32})
        path = "encoder.layers.encoder_layer_3"
        operated = attnsurgeon.insert_attention(vit, "se", at=path)
        attention = operated.get_submodule(f"{path}.attention_post")
        seen = []
        attention.register_forward_hook(lambda module, args, out: seen.append(args[0].shape))
        block, tokens = operated.get_submodule(path), torch.randn(2, 5, 768)
        with torch.no_grad():
            closed = block(tokens)
            next(iter(attnsurgeon.gates(operated).values())).fill_(1.0)
            opened = block(tokens)
        assert seen == [(2, 768, 4)] * 2
        assert torch.equal(opened[:, :1], closed[:, :1])
        assert not torch.equal(opened[:, 1:], closed[:, 1:])

    def test_channels_last(self):
        swin = load_host("swin_t", weights="none")
        operated = attnsurgeon.insert_attention(swin, "cbam", placement="standard", at="*.1.0")
        (cut,) = cuts_of(operated)
        assert cut.sizes == (56, 56)
        assert cut.place.channels == 96
        assert operated.features[1][0].attention_standard.channel.mlp[0].in_channels == 96

    def test_windows_are_no_map(self):
        sites = {site.path: site for site in find_sites(load_host("maxvit_t", weights="none"))}
        windowed = sites["blocks.0.layers.0.layers.window_attention"]
        assert windowed.layout == "NCHW"
        assert windowed.spots["post"].serves == "NCHW"
        assert windowed.spots["standard"].serves == "NLC"

    def test_merges_are_taken_where_nothing_is_residual(self):
        squeezed = load_host("squeezenet1_1", weights="none")
        operated = attnsurgeon.insert_attention(squeezed, "se")
        assert {site.kind for site in find_sites(squeezed)} == {"merge"}
        assert len(cuts_of(operated)) == 8

    def test_a_container_that_walks_its_children_does_not_meet_the_attention(self):
        dense = load_host("densenet121", weights="none")
        operated = attnsurgeon.insert_attention(dense, "se", at="features.denseblock1")
        block = operated.features.denseblock1
        assert len(block) == 6
        assert "attention_post" not in dict(block.items())
        assert any("attention_post" in key for key in operated.state_dict())

    def test_a_sequence_runs_what_follows_it_once(self):
        host = OwnNet().eval()
        operated = attnsurgeon.insert_attention(host, "se", at="trunk", example=EXAMPLE)
        calls = []
        operated.trunk.attention_post.register_forward_hook(lambda *args: calls.append(1))
        image = torch.randn(2, 3, 32, 32)
        assert torch.equal(operated(image), host(image))
        assert len(calls) == 1

    def test_plain_blocks_are_chosen_by_kind_or_name_only(self):
        host, sites = hosts.host("mobilenet_v2"), hosts.sites("mobilenet_v2")
        plain = [site.path for site in sites if site.kind == "plain"]
        assert plain == [f"features.{i}" for i in (1, 2, 4, 7, 11, 14, 17)]
        assert not set(plain) & {cut.path for cut in make_plan(host, sites, "se").cuts}
        chosen = make_plan(host, sites, "se", kind="plain")
        assert [cut.path for cut in chosen.cuts] == plain
        by_name = make_plan(host, sites, "se", at=["features.2", "features.3"])
        assert [cut.path for cut in by_name.cuts] == ["features.2", "features.3"]
        with pytest.raises(PatternUnmatched, match="none of the 10 sites"):
            select_sites(sites, at="features.[2]")

    def test_layers_are_what_is_named(self):
        host = hosts.host("resnet18")
        operated = attnsurgeon.insert_attention(
            host, "gc", at=["maxpool", "layer2.0.conv1"], example=torch.zeros(1, 3, 64, 64)
        )
        assert [cut.path for cut in cuts_of(operated)] == ["maxpool", "layer2.0.conv1"]
        by_pattern = attnsurgeon.insert_attention(
            host, "se", at="layer4.*.bn2", kind="layer", example=torch.zeros(1, 3, 64, 64)
        )
        assert [cut.path for cut in cuts_of(by_pattern)] == ["layer4.0.bn2", "layer4.1.bn2"]
        with pytest.raises(PlacementUnavailable, match="no feature map"):
            attnsurgeon.insert_attention(host, "se", at="fc")
        with pytest.raises(PlacementUnavailable, match="different widths"):
            attnsurgeon.insert_attention(hosts.host("resnet50"), "se", at="layer1.0.relu")

    def test_activations_are_offered_where_nothing_joins(self):
        vgg = load_host("vgg11", weights="none")
        sites = find_sites(vgg)
        assert {site.kind for site in sites} == {"layer"}
        assert len(sites) == 8
        operated = attnsurgeon.insert_attention(vgg, "se", kind="layer", stage=5)
        assert len(cuts_of(operated)) == 2

    def test_unknown_kind(self):
        with pytest.raises(UnknownName, match="did you mean 'merge'"):
            make_plan(hosts.host("resnet18"), hosts.sites("resnet18"), "se", kind="merges")

    def test_attention_that_is_there_is_said(self):
        sites = hosts.sites("efficientnet_b0")
        assert all(site.attention for site in sites)
        plan = make_plan(hosts.host("efficientnet_b0"), sites, "se")
        assert plan.attended == tuple(cut.path for cut in plan.cuts)
        assert not any(site.attention for site in hosts.sites("resnet18"))

    def test_a_module_with_two_paths_is_one_site(self):
        host = Shared().eval()
        sites = find_sites(host, EXAMPLE)
        assert [(site.path, set(site.also)) for site in sites] == [
            ("trunk.0", {"trunk.1", "features.1.0", "features.1.1"})
        ]
        operated = attnsurgeon.insert_attention(host, "se", at="features.1.1", example=EXAMPLE)
        state, original = operated.state_dict(), host.state_dict()
        paths = attention_paths(operated)
        assert [key for key in state if not is_new_key(key, paths)] == list(original)

    def test_two_scales_that_are_added_are_no_block(self):
        class Pyramid(nn.Module):
            def __init__(self):
                super().__init__()
                self.up, self.down = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

            def forward(self, fine, coarse):
                return self.down(fine) + nn.functional.interpolate(
                    self.up(coarse), scale_factor=2.0
                )

        class Network(OwnNet):
            def __init__(self):
                super().__init__()
                self.pyramid = Pyramid()

            def forward(self, x):
                fine = self.trunk[0](self.stem(x))
                return self.pyramid(fine, nn.functional.avg_pool2d(fine, 2))

        assert [site.path for site in find_sites(Network(), EXAMPLE)] == ["trunk.0"]


class TestChoosing:
    SITES = hosts.sites("resnet18")

    def paths(self, **how):
        return [site.path for site in select_sites(self.SITES, **how)]

    def test_patterns(self):
        assert self.paths(at="layer3.*") == ["layer3.0", "layer3.1"]
        assert self.paths(at=["layer1.0", "layer4.*"]) == ["layer1.0", "layer4.0", "layer4.1"]
        assert self.paths(at="layer[12].*", exclude="*.0") == ["layer1.1", "layer2.1"]

    def test_stages_and_steps(self):
        assert self.paths(stages=[2, 4]) == ["layer2.0", "layer2.1", "layer4.0", "layer4.1"]
        assert self.paths(every=3) == ["layer1.0", "layer2.1", "layer4.0"]
        assert self.paths(stages=[3], every=2) == ["layer3.0"]

    @pytest.mark.parametrize(
        ("how", "error", "text"),
        [
            ({"at": "layer5.*"}, PatternUnmatched, "did you mean 'layer"),
            ({"at": ["layer1.*", "layr2.0"]}, PatternUnmatched, "did you mean 'layer2.0'"),
            ({"exclude": "head.*"}, PatternUnmatched, "'head.*' matches none of the 8 sites"),
            ({"stages": [5]}, PatternUnmatched, "the stages are 1 to 4"),
            ({"at": "layer1.*", "exclude": "layer1.*"}, NoSites, "no site is left"),
            ({"at": "layer1.*", "stages": [2]}, NoSites, "no site is left"),
        ],
    )
    def test_what_selects_nothing_is_refused(self, how, error, text):
        with pytest.raises(error) as caught:
            self.paths(**how)
        assert text in str(caught.value)

    def test_sites_without_the_placement_are_skipped_with_the_reason(self):
        host, sites = hosts.host("efficientnet_b0"), hosts.sites("efficientnet_b0")
        plan = make_plan(host, sites, "sk", placement="replace")
        assert len(plan.cuts) + len(plan.skipped) == sum(s.kind == "residual" for s in sites)
        assert all("5x5, not 3x3" in reason for reason in plan.skipped.values())
        named = next(iter(plan.skipped))
        with pytest.raises(PlacementUnavailable, match="5x5, not 3x3"):
            make_plan(host, sites, "sk", placement="replace", at=named)

    def test_unknown_placement(self):
        with pytest.raises(UnknownName, match="did you mean 'standard'"):
            make_plan(hosts.host("resnet18"), self.SITES, "se", placement="standrad")


def test_the_card_of_a_host_gives_the_example(tmp_path):
    """Nobody has to say that digits are 32 px: not at insertion, not after loading."""
    operated = attnsurgeon.insert_attention(load_host("digits"), "se")
    attnsurgeon.save_model(operated, tmp_path / "x.safetensors")
    loaded = attnsurgeon.load_model(tmp_path / "x.safetensors")
    assert find_sites(loaded)[0].shape[2:] == (16, 16)
    assert attnsurgeon.export_model(loaded, tmp_path / "x.pt").checks[0].size == (32, 32)


class Counting(OwnBlock):
    """A block that counts its passes and remembers what it saw."""

    def __init__(self, width, stride=1):
        super().__init__(width, stride)
        self.register_buffer("passes", torch.zeros(1))
        self.seen = []

    def forward(self, features):
        self.passes += 1
        self.seen.append(features.shape[0])
        return super().forward(features)


class Dropping(OwnBlock):
    """A block that is left out at random in training, decided in Python."""

    def forward(self, features):
        if self.training and float(torch.rand(1)) < 0.5 and self.short is None:
            return features
        return super().forward(features)


class Scaled(OwnBlock):
    strength = 0.1

    def forward(self, features):
        branch = self.narrow(self.spread(self.n1(features)))
        return torch.add(features, branch * self.strength, alpha=0.5)


class Normalising(OwnNet):
    """A network that makes a tensor of its own."""

    def forward(self, x):
        return super().forward(x - torch.tensor([0.4, 0.4, 0.4]).view(1, 3, 1, 1))


class Shared(OwnNet):
    """A network whose modules can be reached by two paths, one of them twice in a row."""

    def __init__(self):
        super().__init__()
        self.trunk = nn.Sequential(OwnBlock(8), OwnBlock(8))
        self.trunk[1] = self.trunk[0]
        self.head = nn.Linear(8, 5)
        self.features = nn.Sequential(self.stem, self.trunk)


@pytest.mark.parametrize("make", [Shared, Normalising])
def test_unusual_networks_survive_and_are_operated_on(make):
    torch.manual_seed(0)
    host = make().eval()
    image = torch.randn(2, 3, 32, 32)
    before = host(image)
    operated = attnsurgeon.insert_attention(host, "se", example=EXAMPLE)
    assert torch.equal(host(image), before)
    assert torch.equal(operated(image), before)
    assert {p.device.type for p in host.parameters()} == {"cpu"}


@pytest.mark.parametrize(
    ("block", "reason"), [(Counting, "changes what"), (Dropping, "random|train and eval")]
)
def test_after_a_block_whatever_it_does_goes_on(block, reason):
    torch.manual_seed(0)
    host = OwnNet(block=block).eval()
    state = torch.get_rng_state()
    sites = find_sites(host, EXAMPLE)
    assert torch.equal(torch.get_rng_state(), state)
    assert sites[0].placements == ("post",)
    assert all(re.search(reason, text) for text in sites[0].refused.values())
    operated = attnsurgeon.insert_attention(host, "se", example=EXAMPLE)
    image = torch.randn(2, 3, 32, 32)
    for seed in range(6):
        outputs = []
        for model in (host, operated):
            torch.manual_seed(seed)
            outputs.append(model.train()(image))
        assert torch.equal(*outputs)
    if block is Counting:
        assert float(operated.trunk[0].passes) == float(host.trunk[0].passes) == 6


def test_attributes_stay_live_after_a_block():
    host = OwnNet(block=Scaled, channels=3)
    host.trunk = nn.Sequential(Scaled(8), Scaled(8))
    host.head = nn.Linear(8, 5)
    host.eval()
    sites = find_sites(host, EXAMPLE)
    assert "standard" in sites[0].placements
    operated = attnsurgeon.insert_attention(host, "se", example=EXAMPLE)
    image = torch.randn(2, 3, 32, 32)
    for model in (host, operated):
        for block in model.trunk:
            block.strength = 0.7
    assert torch.equal(operated(image), host(image))


def test_a_forward_set_on_the_object_is_refused():
    host = OwnNet().eval()
    host.trunk[0].forward = types.MethodType(OwnBlock.forward, host.trunk[0])
    with pytest.raises(PlacementUnavailable, match="set on the object"):
        attnsurgeon.insert_attention(host, "se", at="trunk.0", example=EXAMPLE)


class TestUnusable:
    def test_nothing_that_attention_could_follow(self):
        with pytest.raises(NoSites, match="has no site"):
            find_sites(nn.Sequential(nn.Flatten(), nn.Linear(12, 4)), torch.zeros(1, 3, 2, 2))

    def test_no_residual_block(self):
        plain = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
        assert [(site.path, site.kind) for site in find_sites(plain)] == [("1", "layer")]
        with pytest.raises(NoSites, match="no residual block .* --kind layer"):
            attnsurgeon.insert_attention(plain, "se")

    def test_wrong_input(self):
        with pytest.raises(HostUnusable, match=r"\(1, 4, 32, 32\)"):
            find_sites(OwnNet(), torch.zeros(1, 4, 32, 32))

    def test_wrapped(self):
        paths = [site.path for site in find_sites(OwnNet(), EXAMPLE)]
        assert [site.path for site in find_sites(nn.DataParallel(OwnNet()), EXAMPLE)] == paths
        compiled = torch.compile(OwnNet(), backend="eager")
        assert [site.path for site in find_sites(compiled, EXAMPLE)] == paths


class Announcing(nn.Module):
    """A base class that keeps a list of its subclasses."""

    known = {}

    def __init_subclass__(cls, *, tag):
        Announcing.known[tag] = cls


class Announced(OwnBlock, Announcing, tag="block"):
    """A block that is on the list."""


class InPlace(OwnBlock):
    def forward(self, features):
        return features.add_(self.narrow(torch.relu(self.n2(self.spread(features)))))


class Walking(OwnNet):
    """A network that looks into each of its blocks."""

    def forward(self, x):
        return super().forward(x) + sum(block.narrow.weight.mean() for block in self.trunk)


def test_classes_that_list_their_subclasses_do_not_hear_of_the_spliced_one():
    host = OwnNet(block=Announced).eval()
    operated = attnsurgeon.insert_attention(host, "se", placement="standard", example=EXAMPLE)
    image = torch.randn(2, 3, 32, 32)
    assert torch.equal(copy.deepcopy(operated)(image), host(image))
    assert Announcing.known == {"block": Announced}
    with pytest.raises(TypeError, match="tag"):
        type("Another", (Announced,), {})


def test_a_block_that_changes_its_input_in_place_is_refused():
    host = OwnNet(block=InPlace)
    host.trunk = nn.Sequential(InPlace(8), InPlace(8))
    host.head = nn.Linear(8, 5)
    with pytest.raises(HostUnusable, match="in place"):
        attnsurgeon.insert_attention(host, "se", example=EXAMPLE)


def test_a_network_that_walks_a_sequence_is_refused_there():
    with pytest.raises(PlacementUnavailable, match=r"runs one by one .* its last module instead"):
        attnsurgeon.insert_attention(Walking(), "se", at="trunk", example=EXAMPLE)


def test_attention_is_no_site():
    operated = attnsurgeon.insert_attention(OwnNet(), "se", example=EXAMPLE)
    with pytest.raises(PlacementUnavailable, match="is attention itself"):
        attnsurgeon.insert_attention(operated, "se", at="trunk.0.attention_post", example=EXAMPLE)
    found = find_sites(operated, EXAMPLE, named=["trunk.0.*"])
    assert not any("attention" in site.path for site in found)


def test_outputs_may_be_plain_dataclasses():
    class Told(OwnNet):
        def forward(self, x):
            return Output(super().forward(x), 1)

    @dataclasses.dataclass
    class Output:
        logits: torch.Tensor
        count: int

    operated = attnsurgeon.insert_attention(Told(), "se", example=EXAMPLE)
    assert len(attnsurgeon.gates(operated)) == 3

"""The contract of the blocks at their placements in the hosts; a new one is tested by existing."""

import copy
import functools

import pytest
import torch

import attnsurgeon
from attnsurgeon import blocks
from attnsurgeon.errors import BadOption, IdentityBroken, PlacementUnavailable
from attnsurgeon.gate import DEFAULT_FORM, FORMS, gate_numbers
from attnsurgeon.operation import certificate_of, operate
from attnsurgeon.plan import Plan, make_plan
from attnsurgeon.sites import PLACEMENTS
from attnsurgeon.store import load_model, save_model
from attnsurgeon.surgery import apply_plan, attention_paths, cuts_of, is_new_key
from attnsurgeon.verify import verify_unchanged
from tests import exports, hosts

EXAMPLE = torch.zeros(1, 3, 64, 64)
BATCHES = [hosts.image(2), hosts.image(3, (96, 64))]

FULL = ("cbam", "gc", "se", "sk")
"""Run at every placement of every host; between them they multiply, add, normalise and replace."""
OTHERS = [block for block in blocks.names() if block not in FULL]
"""The wiring does not know them apart from those, so a small host takes two of them with all
their placements at once, and a second host all of them, each at one placement."""
CASES = [
    (name, block, placement)
    for name in hosts.NAMES
    for block in FULL
    for placement in blocks.get(block).placements
]
SMALL = "resnet18"
"""Takes each block at each placement by itself, at all its sites at once."""
MORE = [
    *(
        ("resnet18", [(block, place) for block in pair for place in blocks.get(block).placements])
        for pair in zip(OTHERS[::2], [*OTHERS[1::2], OTHERS[0]], strict=False)
    ),
    (
        "mobilenet_v2",
        [
            (block, blocks.get(block).placements[i % len(blocks.get(block).placements)])
            for i, block in enumerate(OTHERS)
        ],
    ),
]


def open_gates(model, seed=0):
    """Open every gate at a value of its own."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for gate in attnsurgeon.gates(model).values():
            gate.copy_(0.25 + 0.75 * torch.rand(1, generator=generator))


def computes_the_same(one, other):
    """Compare two networks in eval mode, where nothing of them changes."""
    with torch.no_grad():
        return torch.equal(one.eval()(BATCHES[0]), other.eval()(BATCHES[0]))


@pytest.mark.parametrize(("name", "block", "placement"), [c for c in CASES if c[0] == SMALL])
def test_contract(name, block, placement, tmp_path):
    """Put a block at one placement of every site of the smallest network."""
    if not hosts.offers(name, block, placement):
        return
    host = hosts.host(name)
    before = {key: tensor.clone() for key, tensor in host.state_dict().items()}
    operated = attnsurgeon.insert_attention(host, block, placement=placement, example=EXAMPLE)
    hold_to_the_contract(host, before, operated, tmp_path)


@pytest.mark.parametrize("block", FULL)
@pytest.mark.parametrize("name", [name for name in hosts.NAMES if name != SMALL])
def test_contract_of_all_placements(name, block, tmp_path):
    """Put a block at every placement that the network has, in turn over its sites.

    Of gates that one cannot learn, the insertion tells each by itself, so that none hides another.
    """
    host, sites = hosts.host(name), hosts.sites(name)
    offered = [p for p in blocks.get(block).placements if hosts.offers(name, block, p)]
    before = {key: tensor.clone() for key, tensor in host.state_dict().items()}
    operated = copy.deepcopy(host)
    for i, placement in enumerate(offered):
        offering = [site.path for site in sites if placement in site.placements]
        at = offering[i :: len(offered)] or offering[-1:]
        apply_plan(operated, make_plan(operated, sites, block, at=at, placement=placement))
    plan = Plan(cuts_of(operated))
    assert {cut.placement for cut in plan.cuts} == set(offered)
    operated = copy.deepcopy(host)
    operate(operated, plan, (EXAMPLE,))
    hold_to_the_contract(host, before, operated, tmp_path)


def test_what_a_network_does_not_have_is_refused():
    lacking = [case for case in CASES if not hosts.offers(*case)]
    assert lacking
    for name, block, placement in lacking:
        with pytest.raises(PlacementUnavailable, match=r"3x3|placement"):
            make_plan(hosts.host(name), hosts.sites(name), block, placement=placement)


def _told(value):
    """Return a case's blocks as its name in the report of the tests."""
    return None if isinstance(value, str) else "+".join(dict.fromkeys(block for block, _ in value))


@pytest.mark.parametrize(("name", "wanted"), MORE, ids=_told)
def test_contract_of_the_others(name, wanted, tmp_path):
    """Put each of these blocks at its placement, in turn over the sites of one network."""
    host, sites = hosts.host(name), hosts.sites(name)
    before = {key: tensor.clone() for key, tensor in host.state_dict().items()}
    operated = copy.deepcopy(host)
    for i, (block, placement) in enumerate(wanted):
        paths = [site.path for site in sites if placement in site.placements]
        at = paths[i % len(paths)]
        apply_plan(operated, make_plan(operated, sites, block, at=at, placement=placement))
    plan = Plan(cuts_of(operated))
    assert [(cut.block, cut.placement) for cut in plan.cuts] == wanted
    operated = copy.deepcopy(host)
    operate(operated, plan, (EXAMPLE,))
    hold_to_the_contract(host, before, operated, tmp_path)


def test_each_of_the_others_is_tried_twice():
    tried = [case for name, wanted in MORE for case in wanted]
    assert {block for block, _ in tried} == set(OTHERS)
    for block in OTHERS:
        count = len(blocks.get(block).placements)
        assert set(blocks.get(block).placements) <= {
            p for b, p in tried[: -len(OTHERS)] if b == block
        }
        assert sum(b == block for b, _ in tried) > count


def hold_to_the_contract(host, before, operated, tmp_path):
    """Check everything that is promised of an operated network; `before` is the host's state."""
    # exact, in eval and train mode, and the given model untouched; the insertion itself has
    # compared other batches and sizes
    verdict = verify_unchanged(host, operated, BATCHES[1])
    assert verdict.exact, verdict.differences
    assert not cuts_of(host)
    assert host.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in host.state_dict().items())
    assert type(operated) is type(host)

    # alive, as the insertion has shown (that it can fail: TestTheChecksHaveTeeth)
    certificate = certificate_of(operated)
    assert certificate.live == certificate.gates == len(attnsurgeon.gates(operated))
    assert certificate.gates >= len(cuts_of(operated)) > 0

    # keys are sacred, both ways
    paths = attention_paths(operated)
    fit = copy.deepcopy(operated).load_state_dict(before, strict=False)
    assert fit.unexpected_keys == []
    assert fit.missing_keys
    assert all(is_new_key(key, paths) for key in fit.missing_keys)
    state = operated.state_dict()
    assert [key for key in state if not is_new_key(key, paths)] == list(before)
    assert all(torch.equal(state[key], before[key]) for key in before)

    # opened gates are noticed
    opened = copy.deepcopy(operated)
    open_gates(opened)
    assert not computes_the_same(host, opened)

    # saved and loaded, gates open, so that what is behind them counts
    file = tmp_path / "operated.safetensors"
    save_model(opened, file)
    loaded = load_model(file)
    assert computes_the_same(opened, loaded)
    assert loaded.state_dict().keys() == state.keys()

    # reversible
    bare = attnsurgeon.remove_attention(loaded)
    assert list(bare.state_dict()) == list(before)
    assert [type(m) for m in bare.modules()] == [type(m) for m in host.modules()]
    assert computes_the_same(host, bare)


OPTIONS = {"ge": {"mlp": True}, "gc": {"reduction": 4}}
"""For a last layer, and for one that reads more than one unit, which its norm would silence."""
REFUSED = {
    "centred": {"bam", "gc", "nonlocal", "scse", "sk", "snl"},
    "layer": {"bam", "simam", "sk"},
}


@pytest.mark.parametrize("block", blocks.names())
@pytest.mark.parametrize("form", [form for form in FORMS if form != DEFAULT_FORM])
def test_contract_of_the_forms(form, block, tmp_path):
    """Hold every form of gate at every block to the same promises, in a tiny network."""
    torch.manual_seed(0)
    host, wanted = exports.Tiny().eval(), {"at": "blocks.1", "gate": form, "example": EXAMPLE}
    if block in REFUSED[form]:
        with pytest.raises(BadOption, match=rf"^{block}: gate '{form}' needs .* it takes mix"):
            attnsurgeon.insert_attention(host, block, **wanted)
        return
    operated = attnsurgeon.insert_attention(host, block, **wanted, **OPTIONS.get(block, {}))
    assert verify_unchanged(host, operated, BATCHES[1]).exact
    certificate = certificate_of(operated)
    assert certificate.live == certificate.gates > 0
    numbers = attnsurgeon.gates(operated).keys() == gate_numbers(operated).keys()
    assert numbers == (form != "layer")
    assert not any(gate.any() for gate in attnsurgeon.gates(operated).values())

    opened = copy.deepcopy(operated)
    open_gates(opened)
    assert not computes_the_same(host, opened)
    save_model(opened, tmp_path / "operated.safetensors")
    loaded = load_model(tmp_path / "operated.safetensors", host=exports.Tiny)
    assert [cut.gate for cut in cuts_of(loaded)] == [form]
    assert computes_the_same(opened, loaded)
    assert computes_the_same(host, attnsurgeon.remove_attention(loaded))


def test_the_cases_are_not_empty():
    offered = [case for case in CASES if hosts.offers(*case)]
    assert len(offered) >= len(CASES) - len(hosts.NAMES)
    assert {placement for _, _, placement in offered} == set(PLACEMENTS)


FORMATS = {"onnx": ".onnx", "torchscript": ".pt", "frozen": ".pt", "program": ".pt2"}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", hosts.NAMES)
def test_exported(name, kind, tmp_path):
    """Export a host with FULL at every placement it has, each at sites of its own.

    The others are exported by themselves, with opened gates: see test_blocks_dims.
    """
    operated = mixture(name)
    made = {(cut.block, cut.placement) for cut in cuts_of(operated)}
    assert made == {case[1:] for case in CASES if case[0] == name and hosts.offers(*case)}
    path = tmp_path / f"x{FORMATS[kind]}"
    artifact = attnsurgeon.export_model(operated, path, example=EXAMPLE, optimize=kind == "frozen")
    assert {check.gates for check in artifact.checks} == {"closed", "open"}
    assert {check.batch for check in artifact.checks} == {1, 2, 5}
    assert len({check.size for check in artifact.checks}) == 3
    assert all(check.passed for check in artifact.checks)
    assert artifact.dynamic
    assert not any("traced" in notice for notice in artifact.notices)  # these can be scripted


@functools.cache
def mixture(name):
    """Put those blocks at every placement, in turn over the sites, so that one export has all."""
    host, sites = hosts.host(name), hosts.sites(name)
    operated = copy.deepcopy(host)
    for placement in PLACEMENTS:
        able = [block for block in FULL if hosts.offers(name, block, placement)]
        offering = [site.path for site in sites if placement in site.placements]
        for i, block in enumerate(able):
            # A few sites each: the attention is what is on trial, and large graphs take long.
            paths = offering[i :: len(able)][:2]
            plan = make_plan(operated, sites, block, at=paths, placement=placement)
            apply_plan(operated, plan)
    leave_out_repetitions(operated, sites)
    return operated


def leave_out_repetitions(model, sites):
    """Take out the residual blocks without attention that keep the shape of their map."""
    idle = {site.path for site in sites if site.kind == "residual"}
    idle -= {cut.path for cut in cuts_of(model)}
    keeping = []

    def look(path):
        def hook(module, args, out):
            if args[0].shape == out.shape:
                keeping.append(path)

        return hook

    hooks = [model.get_submodule(path).register_forward_hook(look(path)) for path in idle]
    model(EXAMPLE)
    for hook in hooks:
        hook.remove()
    for path in keeping:
        model.set_submodule(path, torch.nn.Identity())


class TestTheChecksHaveTeeth:
    """Each promise, broken on purpose, is noticed at insertion."""

    def test_a_gate_that_starts_open(self, monkeypatch):
        start = blocks.get("se").__init__

        def leaky(self, *args, **options):
            start(self, *args, **options)
            self.gate.openness.data.fill_(1e-7)

        monkeypatch.setattr(blocks.get("se"), "__init__", leaky)
        with pytest.raises(IdentityBroken, match="not the same"):
            attnsurgeon.insert_attention(hosts.host("resnet18"), "se", example=EXAMPLE)

    def test_a_dead_gate(self, monkeypatch):
        monkeypatch.setattr(blocks.get("se"), "forward", lambda self, x: x * 1)
        with pytest.raises(IdentityBroken, match="cannot learn"):
            attnsurgeon.insert_attention(hosts.host("resnet18"), "se", example=EXAMPLE)

    def test_a_gate_without_effect_but_with_a_gradient(self, monkeypatch):
        def forward(self, x):
            return x + (self.gate.openness - self.gate.openness.detach())

        monkeypatch.setattr(blocks.get("se"), "forward", forward)
        with pytest.raises(IdentityBroken, match="cannot learn"):
            attnsurgeon.insert_attention(hosts.host("resnet18"), "se", example=EXAMPLE)

    def test_a_running_statistic_that_moves(self, monkeypatch):
        host = copy.deepcopy(hosts.host("resnet18"))
        mean = host.bn1.running_mean

        class Meddling(blocks.get("se")):
            def forward(self, x):
                if self.training:
                    self.mean.add_(1.0)
                return super().forward(x)

        operated = attnsurgeon.insert_attention(host, "se", at="layer1.0", example=EXAMPLE)
        attention = operated.layer1[0].attention_post
        attention.__class__ = Meddling
        object.__setattr__(attention, "mean", operated.bn1.running_mean)
        verdict = verify_unchanged(host, operated, BATCHES[1])
        assert not verdict.exact
        assert all("train" in text for text in verdict.differences)
        assert any("bn1.running_mean" in text for text in verdict.differences)
        assert torch.equal(mean, host.bn1.running_mean)

    def test_a_branch_that_is_all_zero(self):
        host = copy.deepcopy(hosts.host("resnet18"))
        torch.nn.init.zeros_(host.layer1[0].bn2.weight)
        torch.nn.init.zeros_(host.layer1[0].bn2.bias)
        with pytest.raises(IdentityBroken, match="layer1.0.attention_standard"):
            attnsurgeon.insert_attention(host, "se", placement="standard", example=EXAMPLE)

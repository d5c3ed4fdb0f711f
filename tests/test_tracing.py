"""One trace for both modes and all places of a block; where that is too few it is noticed."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import attnsurgeon
from attnsurgeon import surgery
from attnsurgeon.errors import IdentityBroken, PlacementUnavailable
from attnsurgeon.plan import Plan, make_plan
from attnsurgeon.sites import find_sites
from attnsurgeon.surgery import apply_plan, remove_attention
from attnsurgeon.tracing import trace_own_forward

EXAMPLE = torch.zeros(1, 8, 16, 16)
PLACED = ("standard", "pre", "identity", "conv")


def conv(width=8):
    return nn.Conv2d(width, width, 3, padding=1)


class Block(nn.Module):
    """A residual block whose branch is a sequence of sequences."""

    def __init__(self, scale=1.0):
        super().__init__()
        inner = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU())
        self.branch = nn.Sequential(inner, nn.Conv2d(8, 8, 1))
        self.rest = nn.Dropout(0.5)
        self.scale = scale

    def forward(self, x):
        return x + self.branch(x) * self.scale


class Asking(Block):
    """Asks for its mode, and computes the same whatever it is told."""

    def forward(self, x):
        return super().forward(x) if self.training else x + self.branch(x) * self.scale


class AskingByName(Block):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, getattr(self, "training", False))


class Looking(Block):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.__dict__["training"])


class Getting(Block):
    """Asks in the one way that cannot be noticed."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, vars(self).get("training") is True)


class AskingAChild(Block):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.rest.training)


class Own(Block):
    """Has a `training` of its class, which stands before that of every module."""

    training = True

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Twofold(nn.Sequential):
    """Is a sequence and does more, in train mode."""

    def forward(self, x):
        return F.dropout(super().forward(x), 0.5, self.training)


class Holding(Block):
    def __init__(self, scale=1.0):
        super().__init__(scale)
        self.branch = Twofold(conv(), nn.ReLU())


class Net(nn.Sequential):
    """Some blocks, one after the other."""


def refusals(block):
    (site,) = find_sites(Net(block.eval()), EXAMPLE)
    return site.refused


@pytest.mark.parametrize("kind", [AskingByName, Looking, AskingAChild, Own])
def test_a_block_that_differs_in_training_is_found_out_however_it_asks(kind):
    found = refusals(kind())
    assert all("not the same in train and eval mode" in found[name] for name in PLACED)


def test_a_mode_that_is_got_past_the_asking_is_caught_by_the_proof():
    host, where = Net(Getting(), Block()), {"at": "0", "placement": "standard"}
    with pytest.raises(IdentityBroken, match="not the same: train"):
        attnsurgeon.insert_attention(host, "se", **where, example=EXAMPLE, reduction=4)


def test_a_block_that_asks_and_does_the_same_is_taken():
    assert not set(PLACED) & set(refusals(Asking()))


def test_a_child_that_is_opened_may_not_ask_either():
    found = refusals(Holding())
    assert "not the same in train and eval mode" in found["conv"]
    assert "standard" not in found


def test_two_blocks_of_one_class_are_two():
    """What a plain attribute says is fixed where it was traced: in each block for itself."""
    torch.manual_seed(0)
    host = Net(Block(0.5), Block(0.25)).eval()
    operated = attnsurgeon.insert_attention(
        host, "se", placement="standard", example=EXAMPLE, reduction=4
    )
    image = torch.randn(2, 8, 16, 16)
    for seen, block in zip(operated, host, strict=True):
        assert torch.equal(seen(image), block(image))
    assert not torch.equal(host[0](image) - image, host[1](image) - image)


def traced_as_opened(block, monkeypatch):
    """Return the sources of one opened graph: made of the closed one, and by a trace."""
    made = trace_own_forward(block, ["branch.0.0"])
    with monkeypatch.context() as patch:
        patch.setattr("attnsurgeon.tracing._are_sequences", lambda block, paths: False)
        traced = trace_own_forward(block, ["branch.0.0"])
    return [fx.GraphModule(block, graph).code for graph in (made, traced)]


def test_sequences_are_opened_as_a_trace_would(monkeypatch):
    made, traced = traced_as_opened(Block(), monkeypatch)
    assert 'getattr(self.branch, "0"), "0")' in made
    assert made == traced


class Shared(Block):
    def __init__(self, scale=1.0):
        super().__init__(scale)
        self.branch.add_module("again", self.branch[0])


class Named(Block):
    def forward(self, x):
        return x + self.branch(input=x) * self.scale


@pytest.mark.parametrize("kind", [Shared, Named])
def test_unusual_sequences_are_opened_alike(kind, monkeypatch):
    made, traced = traced_as_opened(kind(), monkeypatch)
    assert made == traced


def test_a_hook_on_a_sequence_is_not_lost():
    block = Block().eval()
    block.branch.register_forward_hook(lambda module, args, out: 2 * out)
    torch.manual_seed(0)
    image = torch.randn(2, 8, 16, 16)
    host = Net(block)
    operated = attnsurgeon.insert_attention(
        host, "se", placement="conv", example=EXAMPLE, reduction=4
    )
    assert torch.equal(operated(image), host(image))


@pytest.fixture
def traces(monkeypatch):
    """Return the list of what has been traced."""
    seen = []
    trace = fx.Tracer.trace

    def noting(self, root, *args, **kwargs):
        seen.append(type(root).__name__)
        return trace(self, root, *args, **kwargs)

    monkeypatch.setattr(fx.Tracer, "trace", noting)
    return seen


def test_a_block_is_traced_once_to_be_watched_and_once_to_be_wired(traces):
    model = Net(Block(), Block()).eval()
    sites = find_sites(model, EXAMPLE)
    assert len(traces) == 2
    cuts = []
    for placement in ("post", "standard", "conv", "pre"):
        plan = make_plan(model, sites, "se", placement=placement, options={"reduction": 4})
        cuts += plan.cuts
    traces.clear()
    apply_plan(model, Plan(tuple(cuts)))
    assert len(traces) == 2
    traces.clear()
    assert type(remove_attention(model)[0]) is Block
    assert not traces
    assert [child for child, _ in remove_attention(model, at="0")[1].named_children()][-4:] == [
        "attention_post",
        "attention_standard",
        "attention_conv",
        "attention_pre",
    ]


def test_a_cut_that_fails_takes_all_back(monkeypatch):
    """Also where a block has some of its attention already, and is not wired yet."""
    torch.manual_seed(0)
    model = Net(Block(), Block()).eval()
    sites = find_sites(model, EXAMPLE)
    plans = [
        make_plan(model, sites, "se", placement=placement, options={"reduction": 4})
        for placement in ("post", "standard")
    ]
    image = torch.randn(2, 8, 16, 16)
    before, keys = model(image), list(model.state_dict())
    wire, calls = surgery.wire, []

    def failing(block, wanted):
        calls.append(len(wanted))
        if len(calls) == 2:
            raise PlacementUnavailable("planted")
        wire(block, wanted)

    monkeypatch.setattr(surgery, "wire", failing)
    with pytest.raises(PlacementUnavailable, match="planted"):
        apply_plan(model, Plan(tuple(cut for plan in plans for cut in plan.cuts)))
    assert calls[:2] == [2, 2]
    assert [type(block) for block in model] == [Block, Block]
    assert list(model.state_dict()) == keys
    assert torch.equal(model(image), before)
    assert torch.equal(copy.deepcopy(model)(image), before)


def test_what_notices_is_taken_off_again():
    with pytest.raises(PlacementUnavailable, match="cannot be traced"):
        trace_own_forward(Failing())
    assert "training" not in vars(nn.Module)
    assert Block().training


class Failing(Block):
    def forward(self, x):
        raise ValueError("no")

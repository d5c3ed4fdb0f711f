"""examples/study: what its arms are, how it counts, and that the README tells its results."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnsurgeon
from attnsurgeon.blocks.block import AttentionBlock
from attnsurgeon.training.images import sample_inputs
from examples.study import __main__ as study
from examples.study import afterwards, data, host, run
from examples.study.arms import ARMS, Arm
from examples.study.results import apart, findings, interval, summarise, text

ROOT = Path(__file__).parent.parent
NAMED = {arm.name: arm for arm in ARMS}


def _below(row):
    return apart(row, "against_plain", -1)


def _mean(row):
    return row["against_plain"][0]


def _ends(arm):
    """Return seed -> accuracy at the end."""
    runs = json.loads((ROOT / "examples/study/results.json").read_text("utf-8"))["runs"]
    return {run["seed"]: run["accuracy"][-1] for run in runs if run["arm"] == arm}


def _exceeds(arm, other):
    """Tell whether an arm ended above another by more than the interval, seed by seed."""
    ends = _ends(other)
    mean, half = interval([end - ends[seed] for seed, end in _ends(arm).items()])
    return mean > half


CLAIMS = {
    "No arm beats plain fine-tuning beyond its interval": lambda rows: (
        not any(apart(row, "against_plain", 1) for row in rows.values())
    ),
    "none beats the control that only rescales": lambda rows: (
        not any(apart(row, "against_control", 1) for row in rows.values())
    ),
    "SE and CBAM put in without gates still end below plain": lambda rows: all(
        _below(rows[f"{block} without gates"]) for block in ("se", "cbam")
    ),
    "A gate is no insurance against a rate: with attention at 10 times the host's rate, gated CBAM "
    "ended below plain": lambda rows: _below(rows["cbam gated"]),
    "At the host's own rate no form of any block did": lambda rows: (
        not any(_below(row) for name, row in rows.items() if name.endswith(", rate x1"))
    ),
    "`centred` and `layer` ended nearer to plain than `mix` in SE at 10 times the rate, `layer` by "
    "more than the interval": lambda rows: (
        _mean(rows["se centred"]) > _mean(rows["se gated"])
        and _exceeds("se layer", "se gated")
        and not _exceeds("se centred", "se gated")
    ),
    "and `centred` by more than the interval at the host's own rate: half a point": lambda rows: (
        _exceeds("se centred, rate x1", "se mix, rate x1")
        and not _exceeds("se layer, rate x1", "se mix, rate x1")
    ),
    "Annealing `mix` to 1 and a warm-up with the host frozen (a quarter of the budget) cost "
    "points": lambda rows: (
        _below(rows["se mix, annealed to 1"])
        and all(_mean(row) < -0.03 for name, row in rows.items() if "warm-up" in name)
    ),
    "annealing `centred` to 1 did not": lambda rows: not _below(rows["se centred, annealed to 1"]),
    "Larger starts of the last layer gained nothing": lambda rows: (
        not any(
            _exceeds(f"se {form}, start x{gain}", arm)
            for form, arm, gains in (
                ("mix", "se gated", (3, 10)),
                ("centred", "se centred", (3, 10)),
            )
            for gain in gains
        )
    ),
    "GC's own zero start ended below GC behind a gate": lambda rows: _exceeds(
        "gc gated", "gc, its own zero start"
    ),
    "non-local's own at 10 times the rate lost the network in every seed": lambda rows: all(
        accuracy < 0.15 for accuracy in _ends("nonlocal layer").values()
    ),
    "`--gate centred` lost least wherever the rate is high": lambda rows: all(
        _mean(rows[f"{arm}{rate}"]) < _mean(rows[f"{centred}{rate}"])
        for rate, forms in (("", ("se gated", "se layer")), (", rate x100", ("se mix", "se layer")))
        for centred, arms in (("se centred", forms),)
        for arm in arms
    ),
}
"""What the README concludes, each with what must be so in the results for it to be said."""


@pytest.fixture(scope="module")
def parts():
    found = data.load()
    return replace(found, held_out=tuple(part[:64] for part in found.held_out))


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    return host.build().eval()


def attention(model):
    return [module for module in model.modules() if isinstance(module, AttentionBlock)]


class TestData:
    def test_nothing_that_is_tested_on_was_trained_on(self):
        found = data.load()
        held = {image.numpy().tobytes() for image in found.host[0]}
        assert len(found.share[1]) == data.SHARE
        assert {image.numpy().tobytes() for image in found.share[0]} <= held
        assert len(found.host[1]) + data.HELD_OUT == 1797
        assert len(found.held_out[1]) == data.HELD_OUT * data.DRAWS

    @pytest.mark.parametrize(
        "change", [{"turn": 40}, {"shift": 0.5}, {"noise": 1}, {"hidden": 3}, {"inverted": 1}]
    )
    def test_each_kind_of_change_changes_something(self, parts, change):
        def draw(domain):
            return domain.change(parts.share[0][:4], torch.Generator().manual_seed(0))

        still = data.Domain(turn=0, shift=0, noise=0, hidden=0, inverted=0)
        assert draw(still).shape == (4, 3, data.SIZE, data.SIZE)
        assert not torch.equal(draw(still), draw(replace(still, **change)))


class TestArms:
    def test_all_start_as_the_host_but_those_without_gates(self, network, parts):
        image = parts.held_out[0][:4]
        for name in ("se gated", "se layer", "se mix, per channel", "se without gates"):
            model = run.make(NAMED[name], network, 0).eval()
            assert torch.equal(model(image), network(image)) == (not NAMED[name].ungated)

    def test_a_gate_per_channel(self, network):
        blocks = attention(run.make(NAMED["se mix, per channel"], network, 0))
        assert [b.gate.openness.numel() for b in blocks] == [12, 12, 24, 24, 48, 48]

    def test_a_start_that_is_larger(self, network):
        one, ten = (
            attention(run.make(Arm("", gain=gain), network, 0))[0].excite.weight
            for gain in (1.0, 10.0)
        )
        assert torch.allclose(10 * one, ten)

    @pytest.mark.parametrize(
        ("name", "learns"),
        [
            ("only rescales, one number", "gate.openness"),
            ("only rescales, per channel", "excite.bias"),
        ],
    )
    def test_a_control_is_the_same_for_all_images(self, network, name, learns):
        for block in attention(run.make(NAMED[name], network, 0)):
            assert [n for n, p in block.named_parameters() if p.requires_grad] == [learns]
            dict(block.named_parameters())[learns].data.fill_(0.3)
            x = torch.randn(3, block.excite.out_channels, 4, 4)
            factor = block(x) / x
            assert torch.allclose(factor, factor[:1].expand_as(factor), atol=1e-5)
            assert not torch.allclose(factor, torch.ones_like(factor))

    def test_arms_share_an_insertion_and_nothing_else(self, network):
        one, other = (run.make(NAMED["se gated"], network, 0) for _ in range(2))
        attention(one)[0].gate.openness.data.fill_(1)
        assert attention(other)[0].gate.openness.item() == 0

    def test_all_arms_of_a_seed_see_the_same(self, parts):
        first, again = (data.lessons(parts, 0, 2, 4) for _ in range(2))
        assert first is again
        images, labels = data.lessons(parts, 1, 2, 4)[0]
        assert images.shape == (4, 3, data.SIZE, data.SIZE)
        assert len(labels) == 4
        assert not torch.equal(images, first[0][0])

    def test_warm_up_annealing_and_rates_change_the_run(self, network, parts, monkeypatch):
        monkeypatch.setattr(run, "STEPS", 2)
        monkeypatch.setattr(run, "MEASURED", (0, 2))
        plain = Arm("", rate=1)
        ends = {}
        for change in ({}, {"warm_up": 1}, {"anneal": 2}, {"rate": 10.0}, {"gate_rate": 10.0}):
            accuracy, model = run.fine_tune(replace(plain, **change), network, parts, 0)
            assert len(accuracy) == 2
            ends[str(change)] = torch.cat([p.detach().flatten() for p in model.parameters()])
            if "anneal" in change:
                assert {g.item() for g in attnsurgeon.gates(model).values()} == {1}
        assert len({tuple(end.tolist()) for end in ends.values()}) == len(ends)

    def test_a_lost_gate_reads_what_chance_reads(self, network, parts, monkeypatch):
        monkeypatch.setattr(run, "STEPS", 2)
        monkeypatch.setattr(run, "MEASURED", (0, 2))
        accuracy, _ = run.fine_tune(Arm("", rate=1e38), network, parts, 0)
        assert accuracy[1:] == [0.1]


class TestResults:
    def test_the_interval_is_students(self):
        mean, half = interval([1.0, 2.0, 3.0, 4.0, 5.0])
        assert mean == 3
        assert half == pytest.approx(2.776445 * math.sqrt(2.5 / 5), rel=1e-5)

    def test_differences_are_paired_by_seed(self):
        arms = [Arm("plain", half=1, block=None), Arm("better", half=1), Arm("worse")]
        shift = {"plain": 0.0, "better": 0.01, "worse": -0.02}
        runs = [
            {"arm": name, "seed": seed, "accuracy": [0.5] * 6 + [0.6 + 0.1 * seed + by]}
            for name, by in shift.items()
            for seed in range(3)
        ]
        told = summarise(runs, arms)
        mean, half = told["arms"][1]["against_plain"]
        assert (mean, half) == (pytest.approx(0.01), pytest.approx(0, abs=1e-9))
        assert told["arms"][1]["accuracy"][-1][1] > 0.2
        assert "**+1.0 ± 0.0**" in text(told)
        assert "**-2.0 ± 0.0**" in text(told)

    def test_the_readme_has_what_the_script_wrote(self):
        results = json.loads((ROOT / "examples/study/results.json").read_text("utf-8"))
        readme = (ROOT / "README.md").read_text("utf-8")
        assert study.put_between(readme, text(results)) == readme
        assert {**results, **summarise(results["runs"], ARMS)} == results
        assert results["shown"] in NAMED
        assert len(results["varies"]) == 6
        assert results["seeds"] >= 5

    def test_the_findings_are_counted(self):
        arms = [Arm("plain", half=1, block=None), Arm("se", half=1), Arm("se without gates")]
        ends = {"plain": 0.6, "se": 0.62, "se without gates": 0.5}
        runs = [
            {"arm": name, "seed": seed, "accuracy": [0.1 * end] * 6 + [end + 0.01 * seed]}
            for name, end in ends.items()
            for seed in range(3)
        ]
        told = findings({**summarise(runs, arms), "shown": "se", "varies": [0.01, 0.025]})
        assert "Ended above plain fine-tuning by more than the interval: se (+2.0 ± 0.0)." in told
        assert "Ended below it by more than the interval: se without gates (-10.0 ± 0.0)." in told
        assert "starts at 6.0 %, those with gates at 6.2 %, those without at 5.0 %" in told
        assert "the maps of `se` differ by 1.0 to 2.5 % of" in told
        assert "Of 2 differences at 95 %, 0.1 are expected" in told
        assert "the control" not in told

    @pytest.mark.parametrize("said", CLAIMS)
    def test_what_the_readme_concludes_holds(self, said):
        results = json.loads((ROOT / "examples/study/results.json").read_text("utf-8"))
        readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
        assert said in readme
        assert CLAIMS[said]({row["arm"]: row for row in results["arms"]})

    def test_only_what_stands_between_the_marks_is_exchanged(self):
        first, last = study.MARKS
        page = f"a\n{first}\nold\n{last}\nb\n"
        once = study.put_between(page, "new\n")
        assert "old" not in once
        assert once.startswith("a\n")
        assert once.endswith("b\n")
        assert study.put_between(once, "new\n") == once


def test_gates_show_and_remove_work_on_what_it_leaves(network, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(run, "STEPS", 1)
    monkeypatch.setattr(run, "MEASURED", (0, 1))
    arm = NAMED[study.SHOWN]
    model = run.fine_tune(arm, network, parts, 0)[1]
    attnsurgeon.save_model(model, tmp_path / study.TRAINED)
    varies = afterwards.look_at(tmp_path / study.TRAINED)
    assert len(varies) == 6
    assert max(varies) > 0
    (read,) = sample_inputs(model, tmp_path / "images").inputs
    inside = parts.held_out[0][: afterwards.IMAGES].abs() < 1.7  # what a file's 0 to 1 can hold
    assert (read - parts.held_out[0][: afterwards.IMAGES])[inside].abs().max() < 0.02
    for name in ("gates.svg", "page.html", "plain.safetensors"):
        assert (tmp_path / name).exists()

"""examples/study: what its arms are, how it counts, and that the README tells its results."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnsurgeon
from attnsurgeon.blocks.block import AttentionBlock
from examples.study import __main__ as study
from examples.study import data, host, run
from examples.study.arms import ARMS, Arm
from examples.study.results import interval, summarise, text

ROOT = Path(__file__).parent.parent
NAMED = {arm.name: arm for arm in ARMS}


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

    def test_warm_up_annealing_and_rates_change_the_run(self, network, parts, monkeypatch):
        monkeypatch.setattr(run, "STEPS", 2)
        monkeypatch.setattr(run, "MEASURED", (0, 2))
        plain = Arm("", rate=1)
        ends = {}
        for change in ({}, {"warm_up": 1}, {"anneal": 2}, {"rate": 10.0}):
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
        assert summarise(results["runs"], ARMS) == results
        assert results["seeds"] >= 5

    def test_only_what_stands_between_the_marks_is_exchanged(self):
        first, last = study.MARKS
        page = f"a\n{first}\nold\n{last}\nb\n"
        once = study.put_between(page, "new\n")
        assert "old" not in once
        assert once.startswith("a\n")
        assert once.endswith("b\n")
        assert study.put_between(once, "new\n") == once

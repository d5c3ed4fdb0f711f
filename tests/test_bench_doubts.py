"""Doubts: each is raised where it is due, and only there."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from attnsurgeon import compare_speed
from attnsurgeon.bench import ceilings, doubts, job, judging, rounds, timing, watch
from attnsurgeon.bench.engines import eager, engine
from attnsurgeon.cost import count_call
from attnsurgeon.report.figures import milliseconds, percentile_interval, supported
from tests.networks import IMAGE, QUICK
from tests.test_bench_race import FakeMachine


@pytest.fixture
def machine(monkeypatch):
    made = FakeMachine()
    monkeypatch.setattr(timing, "clock_ns", made.clock)
    return made


def race_of(values):
    """Return a race of two, whose rounds have these ratios."""
    found = tuple(([1.0, value], [1.0, value]) for value in values)
    return rounds.Race(((1.0,), (1.0,)), found, planned=len(values))


class TestSettled:
    def test_a_quiet_race_ends_when_it_is_told(self, machine):
        found = timing.race([machine.runner(7), machine.runner(8)], 5)
        assert len(found.rounds) == found.planned
        assert rounds.is_settled(found)

    def test_a_ratio_that_moves_makes_it_go_on_and_is_told(self, machine):
        pair = [machine.runner(10), machine.runner(10, drift=0.05)]
        found = timing.race(pair, 10)
        assert len(found.rounds) == timing.PATIENCE * found.planned
        assert not rounds.is_settled(found)
        assert "not stable" in doubts.stability_doubt(found, 10)

    def test_it_ends_as_soon_as_it_is_settled(self, machine):
        steps = [1.1] * 6 + [1.0] * 10
        assert not rounds.is_settled(race_of(steps))
        assert rounds.is_settled(race_of([1.0, 1.001] * 8))
        pair = [machine.runner(10), machine.runner(10, noise=0.05)]
        found = timing.race(pair, 10)
        assert found.planned <= len(found.rounds) < timing.PATIENCE * found.planned

    def test_a_lone_runner_has_to_keep_its_time(self, machine):
        assert rounds.is_settled(timing.race([machine.runner(10)], 5))
        assert not rounds.is_settled(timing.race([machine.runner(10, drift=0.1)], 10))

    def test_spread_explains_a_difference(self):
        random = np.random.default_rng(0)
        settled = [rounds.halves_agree(list(random.normal(0, 0.05, 10)), 0.005) for _ in range(200)]
        assert sum(settled) >= 190

    def test_a_disturbed_race_takes_its_time_and_says_what_it_compared(self, machine):
        pair = [machine.runner(100, held_up=0.5), machine.runner(100, held_up=0.5)]
        found = timing.race(pair, 20)
        assert len(found.rounds) == timing.PATIENCE * found.planned
        told = doubts.stability_doubt(found, 20)
        assert told.startswith("disturbed")
        assert "fastest quarter" in told

    def test_what_was_known_to_hold_it_up_is_said_to_be_taken_off(self, machine, monkeypatch):
        monkeypatch.setattr(timing, "waited_ns", machine.waited)
        pair = [machine.runner(100, held_up=0.5, told=1.0) for _ in range(2)]
        told = doubts.stability_doubt(timing.race(pair, 20), 20)
        assert "without the time that they waited for a core" in told

    def test_too_few_say_nothing(self):
        assert not rounds.halves_agree([0.0, 0.0, 0.0], 1.0)


class TestReasons:
    def test_spread(self):
        assert doubts.spread_doubt([1.0, 1.01, 1.02, 1.0]) is None
        assert "spans 67 %" in doubts.spread_doubt([1.0, 1.0, 2.0, 2.0, 1.0, 2.0, 1.5])

    def test_drift(self):
        assert doubts.drift_doubt([0.0, 0.01, 0.0, 0.01]) is None
        assert "+22 %" in doubts.drift_doubt([0.0, 0.1, 0.2])

    def test_stability(self):
        assert doubts.stability_doubt(race_of([1.0] * 10), 1) is None
        told = doubts.stability_doubt(race_of([1.0] * 5 + [1.2] * 5), 1)
        assert told.startswith("not stable")
        assert "--seconds 1" in told

    def test_a_lone_network_that_does_not_settle_is_doubted(self, monkeypatch):
        monkeypatch.setattr(job, "stability_doubt", lambda race, seconds: "not stable: planted")
        (run,) = compare_speed(["digits"], **QUICK).runs
        assert "not stable: planted" in run.doubts

    def test_other_load_and_throttled_clocks(self):
        assert doubts.machine_doubts(watch.Noticed(0.05, ())) == []
        assert doubts.machine_doubts(watch.Noticed(None, ())) == []
        load, clock = doubts.machine_doubts(watch.Noticed(1.04, ("GPU",)))
        assert load == "other load: others kept 1.0 cores busy meanwhile"
        assert clock == "throttled: the GPU was slowed down meanwhile"

    def test_enqueue_bound(self):
        assert doubts.launch_doubt(None) is None
        assert doubts.launch_doubt(0.3) is None
        assert "enqueue-bound" in doubts.launch_doubt(0.97)

    def test_transfer_bound(self):
        assert doubts.transfer_doubt(None, 1.0) is None
        assert doubts.transfer_doubt(0.1, 1.0) is None
        assert "takes 2 ms" in doubts.transfer_doubt(2.0, 3.0)

    def test_folded_away(self):
        opened, closed = [torch.tensor([1.0, 2.0])], [torch.tensor([1.0, 1.0])]
        assert doubts.folded_doubt([torch.tensor([1.0, 1.9])], opened, closed) is None
        assert "folded away" in doubts.folded_doubt([torch.tensor([1.0, 1.1])], opened, closed)
        faint = [torch.tensor([1.0, 1.0 + 1e-6])]
        assert doubts.folded_doubt(closed, faint, closed) is None

    def test_not_finite(self):
        fine = [torch.tensor([1.0, 2.0]), torch.tensor([3]), torch.empty(0)]
        assert doubts.finite_doubt(fine) is None
        for wrong in ("nan", "inf", "-inf"):
            assert "not finite" in doubts.finite_doubt([*fine, torch.tensor([0.0, float(wrong)])])

    def test_a_network_that_overflows_is_doubted(self):
        class Overflowing(nn.Module):
            def forward(self, x):
                return x.mean((2, 3)) / 0

        (run,) = compare_speed([Overflowing()], example=torch.ones(1, 3, 8, 8), **QUICK).runs
        assert any(doubt.startswith("not finite") for doubt in run.doubts)

    def test_an_engine_that_folds_the_attention_away_is_found_out(self, digits_file, monkeypatch):
        def fold(target, inputs, place):
            for name, parameter in target.module.named_parameters():
                if name.endswith("openness"):
                    parameter.data = torch.zeros(1)
            runner = eager.run_eager(target, inputs, place)
            held = runner.call()
            for name, parameter in target.module.named_parameters():
                if name.endswith("openness"):
                    parameter.data = torch.full((1,), 0.5)
            return timing.Runner(runner.call, runner.move, first=lambda: held)

        monkeypatch.setitem(engine._registry._things, "eager", engine.Engine(fold, lambda d: None))
        report = compare_speed([digits_file], **QUICK)
        assert any("folded away" in doubt for doubt in report.comparisons[0].doubts)
        assert not any("folded" in doubt for doubt in report.runs[0].doubts)

    @pytest.mark.parametrize("name", ["eager", "torchscript-frozen"])
    def test_an_engine_that_runs_it_is_not(self, digits_file, name):
        report = compare_speed([digits_file], engines=(name,), **QUICK)
        assert not any("folded" in d for run in report.runs for d in run.doubts)


class TestWatch:
    def test_others_are_told_from_oneself(self, monkeypatch):
        seconds = iter([100.0, 130.0])
        monkeypatch.setattr(watch, "_busy_s", lambda: next(seconds))
        monkeypatch.setattr(watch.time, "monotonic", iter([0.0, 10.0]).__next__)
        monkeypatch.setattr(watch.time, "process_time", iter([0.0, 10.0]).__next__)
        assert watch.Watch(torch.device("cpu")).look().other_cores == pytest.approx(2.0)

    def test_counters_that_rise(self, tmp_path, monkeypatch):
        heat = tmp_path / "cpu0" / "thermal_throttle" / "core_throttle_count"
        heat.parent.mkdir(parents=True)
        quota = tmp_path / "cpu.stat"
        monkeypatch.setattr(watch, "CPUS", tmp_path)
        monkeypatch.setattr(watch, "_GROUP", quota)
        heat.write_text("3\n")
        quota.write_text("usage_usec 9\nnr_throttled 1\n")
        seen = watch.Watch(torch.device("cpu"))
        assert seen.look().throttled == ()
        heat.write_text("4\n")
        assert seen.look().throttled == ("CPU",)
        quota.write_text("nr_throttled 2\n")
        assert seen.look().throttled == ("CPU", "CPU quota")

    def test_a_slowed_gpu(self, monkeypatch):
        for told, is_slowed in (("0x0000000000000040", True), ("0x0000000000000001", False)):
            monkeypatch.setattr(watch, "ask_nvidia", lambda *words, told=told: [told])
            assert watch._gpu_is_slowed(torch.device("cuda", 0)) is is_slowed
        monkeypatch.setattr(watch, "ask_nvidia", lambda *words: None)
        assert not watch._gpu_is_slowed(torch.device("cuda", 0))

    def test_the_governor(self, tmp_path, monkeypatch):
        monkeypatch.setattr(watch, "CPUS", tmp_path)
        assert watch.governor() is None
        path = tmp_path / "cpu0" / "cpufreq" / "scaling_governor"
        path.parent.mkdir(parents=True)
        path.write_text("powersave\n")
        assert watch.governor() == "powersave"


class TestFigures:
    def test_percentiles_throughput_and_variation(self):
        from attnsurgeon.bench import Timing

        run = Timing("x", "eager", "cpu", 4, tuple(range(1, 101)))
        data = run.to_json()
        assert data["p50_ms"] == data["median_ms"] == 50.5
        assert data["p5_ms"] < data["p90_ms"] < data["p95_ms"] < data["p99_ms"]
        assert data["images_per_s"] == pytest.approx(4000 / 50.5, rel=1e-4)
        assert data["variation"] == pytest.approx(np.std(range(1, 101)) / 50.5, rel=1e-3)

    def test_traffic_and_uncounted_operators(self):
        net = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.ReLU(), nn.Flatten())
        _, count = count_call(lambda: net(torch.zeros(2, 3, 4, 4)), net.parameters())
        image, maps = 2 * 3 * 16 * 4, 2 * 8 * 16 * 4
        assert count.weight_bytes == 3 * 8 * 4
        assert count.map_bytes == image + maps + 2 * maps  # flattening moves nothing
        assert count.macs == 2 * 16 * 3 * 8
        assert count.uncounted == ("relu",)

    def test_shares_of_the_ceilings(self, digits_file):
        report = compare_speed([digits_file], **QUICK)
        (ceiling,) = report.environment["ceilings"]
        for run in report.runs:
            rate = run.macs / (run.median_ms / 1e3)
            assert run.arithmetic_share == pytest.approx(rate / ceiling["macs_per_s"], rel=0.01)
            assert 0 < run.bandwidth_share < 10
        assert report.runs[1].uncounted != report.runs[0].uncounted  # the sigmoid

    def test_a_ceiling_is_higher_than_what_is_reached(self):
        found = ceilings.measure_ceilings(torch.device("cpu"), "fp32")
        assert found.bytes_per_s > 1e8
        assert found.macs_per_s > 1e8

    def test_the_interval_of_a_median(self):
        logs = [math.log(10), math.log(11), math.log(10), math.log(11)]
        low, high = judging.median_interval(logs, 10.5)
        assert 9 < low < 10.5 < high < 12
        assert judging.median_interval(logs[:1], 10.5) is None

    def test_load_time_and_first_run(self, digits_file):
        run = compare_speed([digits_file], engines=("torchscript",), **QUICK).runs[1]
        assert run.load_s > 0.01
        assert run.first_run_ms > run.median_ms

    def test_a_percentile_has_fewer_digits_than_the_median(self):
        samples = [*(10 + 0.001 * i for i in range(97)), 20.0, 30.0, 40.0]
        run = {"samples_ms": samples, "median95_ms": [10.047, 10.049]}
        assert milliseconds({**run, "median_ms": 10.0485}, "median_ms") == "10.0485"
        assert milliseconds({**run, "p99_ms": 30.123}, "p99_ms") == "30"
        assert percentile_interval(samples, 50) == (samples[40], samples[60])

    @pytest.mark.parametrize(
        ("value", "interval", "text"),
        [
            (12.3456, (12.2, 12.5), "12.35"),
            (12.3456, (11.0, 13.0), "12.3"),
            (12.3456, (7.0, 17.0), "12"),
            (1234.5, (1000.0, 1500.0), "1230"),
            (0.0, None, "0"),
            (0.012345, None, "0.0123"),
        ],
    )
    def test_digits_that_are_supported(self, value, interval, text):
        assert supported(value, interval) == text


def test_images_are_sent_only_to_a_device():
    from attnsurgeon.bench.inputs import send_inputs

    sent, ms = send_inputs((IMAGE,), torch.device("cpu"))
    assert sent[0] is IMAGE
    assert ms is None

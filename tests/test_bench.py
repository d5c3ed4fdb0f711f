"""The bench: honest about noise, about what ran, and about what it was lent."""

import gc
import json
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn

import attnsurgeon
from attnsurgeon import bench, compare_speed
from attnsurgeon.bench import engines, environment, exported, interval, targets, timing
from attnsurgeon.cli import bench as cli_bench
from attnsurgeon.cost import multiply_adds
from attnsurgeon.errors import (
    BadFile,
    BadOption,
    EngineUnavailable,
    HostUnusable,
    UnknownName,
)
from attnsurgeon.export.onnx import write_onnx
from attnsurgeon.export.torchscript import make_torchscript
from attnsurgeon.host import load_host

QUICK = {"seconds": 0.2, "threads": 1, "device": "cpu"}
IMAGE = torch.zeros(1, 3, 32, 32)
SIZES = json.dumps([20, 24])


class Tiny(nn.Module):
    """A residual network that is soon translated; `work` repeats its middle."""

    def __init__(self, channels: int = 3, classes: int = 4, work: int = 1):
        super().__init__()
        self.stem = nn.Conv2d(channels, 8, 3, padding=1)
        self.middle = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, classes)
        self.work = work

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for _ in range(self.work):
            x = torch.relu(self.middle(x) + x)
        return self.head(x.mean((2, 3)))


class Spy(nn.Module):
    """Notes what a forward pass sees."""

    seen: list

    def __init__(self):
        super().__init__()
        self.net = Tiny()

    def forward(self, x):
        torch.rand(1)  # a network may draw: the caller's random state is not its
        Spy.seen.append(
            {
                "shape": tuple(x.shape),
                "threads": torch.get_num_threads(),
                "grad": torch.is_grad_enabled(),
                "collector": gc.isenabled(),
                "training": self.training,
            }
        )
        return self.net(x)


@pytest.fixture
def spied():
    Spy.seen = []
    return Spy()


@pytest.fixture(scope="module")
def digits_file(tmp_path_factory):
    """An operated `digits`, gates closed as inserted."""
    host = load_host("digits")
    operated = attnsurgeon.insert_attention(host, "se", at="features.1[0-9]*", example=IMAGE)
    path = tmp_path_factory.mktemp("bench") / "digits_se.safetensors"
    attnsurgeon.save_model(operated, path)
    return path


@pytest.fixture(scope="module")
def tiny_onnx(tmp_path_factory):
    path = tmp_path_factory.mktemp("onnx") / "tiny.onnx"
    write_onnx(Tiny().eval(), (torch.randn(2, 3, 20, 24),), path)
    return path


@pytest.fixture(scope="module")
def tiny_script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "tiny.pt"
    module = make_torchscript(Tiny().eval(), (torch.randn(2, 3, 20, 24),))
    module.save(str(path), _extra_files={"input_size": SIZES})
    return path


@pytest.fixture
def cpu_clock(monkeypatch):
    """Count this thread's own work instead of the wall: others on the machine do not matter."""
    monkeypatch.setattr(timing, "clock_ns", time.thread_time_ns)


def rounds_of(random, truth, *, rounds=12, passes=8, between=0.005, within=0.03):
    """Return log ratios as a machine makes them: each round off by something of its own."""
    return [
        math.log(truth) + random.normal(0, between) + random.normal(0, within, passes)
        for _ in range(rounds)
    ]


class TestInterval:
    def test_three_percent_in_noise_are_found(self):
        random = np.random.default_rng(0)
        found = interval.estimate(rounds_of(random, 1.03, rounds=16, passes=20, between=0.001))
        assert found.low < 1.03 < found.high
        assert found.low > 1.02
        assert found.high < 1.04

    def test_noise_is_called_noise(self):
        found = interval.estimate(rounds_of(np.random.default_rng(0), 1.0))
        assert found.low < 1 < found.high
        assert interval.verdict(found) == "not distinguishable from noise"

    @pytest.mark.parametrize("rounds", [5, 16])
    def test_the_truth_is_inside_as_often_as_promised(self, rounds):
        random = np.random.default_rng(1)
        draws = (
            interval.estimate(rounds_of(random, 1.05, rounds=rounds), seed=i) for i in range(100)
        )
        assert sum(found.low <= 1.05 <= found.high for found in draws) >= 90

    def test_pairs_of_one_round_are_not_taken_for_independent(self):
        # 40 pairs each that agree perfectly within a round say no more than one pair each.
        random = np.random.default_rng(2)
        wide = interval.estimate(rounds_of(random, 1, rounds=6, passes=40, between=0.02, within=0))
        assert wide.high - wide.low > 0.02

    def test_disturbed_pairs_do_not_move_it(self):
        clean = rounds_of(np.random.default_rng(3), 1.02, passes=20)
        disturbed = [[5.0, *row[1:]] for row in clean]
        before, after = interval.estimate(clean), interval.estimate(disturbed)
        assert after.ratio == pytest.approx(before.ratio, rel=3e-3)

    def test_more_rounds_make_it_narrower(self):
        few, many = (
            interval.estimate(rounds_of(np.random.default_rng(4), 1, rounds=n)) for n in (5, 40)
        )
        assert many.high - many.low < 0.6 * (few.high - few.low)

    def test_the_same_pairs_give_the_same_interval_and_the_seed_another(self):
        pairs = rounds_of(np.random.default_rng(5), 1)
        assert interval.estimate(pairs) == interval.estimate(pairs)
        assert interval.estimate(pairs, seed=1) != interval.estimate(pairs)

    def test_one_round_has_no_interval(self):
        with pytest.raises(ValueError, match="two rounds"):
            interval.estimate([[0.0, 0.1]])

    @pytest.mark.parametrize(("degrees", "quantile"), [(4, 2.776), (9, 2.262), (15, 2.131)])
    def test_students_quantile(self, degrees, quantile):
        assert interval.student_quantile(degrees) == pytest.approx(quantile, abs=2e-3)

    @pytest.mark.parametrize(
        ("ratio", "low", "high", "words"),
        [
            (1.062, 1.051, 1.074, "+6.2 % [5.1, 7.4]"),
            (0.969, 0.960, 0.978, "-3.1 % [-4.0, -2.2]"),
            (1.2012, 1.151, 1.252, "+20 % [15, 25]"),
            (1.00412, 1.0032, 1.0050, "+0.41 % [0.32, 0.50]"),
            (1.0621, 1.0538, 1.0704, "+6.2 % [5.4, 7.0]"),
            (1.02, 0.99, 1.05, interval.NOISE),
            (0.98, 0.95, 1.01, interval.NOISE),
            (1.01, 1.0003, 1.03, interval.NOISE),  # its lower end is 0.0 % at the digits it has
            (1.00004, 1.00002, 1.00006, interval.NOISE),
        ],
    )
    def test_verdict_in_words(self, ratio, low, high, words):
        assert interval.verdict(interval.Estimate(ratio, low, high)) == words


class FakeMachine:
    """A clock that runners push forward, with all that a real machine does to them."""

    def __init__(self, seed=0):
        self.now_ns = 0
        self.random = np.random.default_rng(seed)
        self.last = None

    def clock(self):
        return self.now_ns

    def runner(self, ms, *, drift=0.0, switch_ms=0.0, noise=0.0, placement=0.0, moving_ms=1.0):
        """Return a runner of `ms` a call.

        Args:
            drift: share that all calls become slower per second.
            switch_ms: what the first call after another runner's costs on top.
            noise: standard deviation of a call, relative.
            placement: standard deviation of what a move does to all calls until the next.
        """
        state = {"placed": 1.0, "moves": 0}
        me = object()

        def call():
            cost = ms * state["placed"] * (1 + drift * self.now_ns / 1e9)
            cost *= 1 + noise * self.random.standard_normal()
            if self.last is not me:
                cost += switch_ms
            self.last = me
            self.now_ns += round(1e6 * cost)

        def move():
            state["placed"] = 1 + placement * self.random.standard_normal()
            state["moves"] += 1
            self.now_ns += round(1e6 * moving_ms)

        runner = timing.Runner(call, move)
        self.states = {**getattr(self, "states", {}), id(runner): state}
        return runner

    def moves(self, runner):
        return self.states[id(runner)]["moves"]


@pytest.fixture
def machine(monkeypatch):
    made = FakeMachine()
    monkeypatch.setattr(timing, "clock_ns", made.clock)
    return made


def ratio_of(found):
    return interval.estimate(found.log_ratios(1))


class TestRace:
    def test_drift_cancels(self, machine):
        pair = [machine.runner(10, drift=0.1), machine.runner(10.3, drift=0.1)]
        found = timing.race(pair, 10)
        assert ratio_of(found).ratio == pytest.approx(1.03, abs=2e-3)
        one_after_the_other = np.median(found.samples_ms[0][: len(found.samples_ms[0]) // 2])
        assert np.median(found.samples_ms[0]) / one_after_the_other > 1.1  # there was drift

    def test_being_first_or_second_cancels(self, machine):
        pair = [machine.runner(60, switch_ms=6), machine.runner(60, switch_ms=6)]
        found = ratio_of(timing.race(pair, 20))
        assert found.ratio == pytest.approx(1, abs=5e-3)
        assert interval.verdict(found) == interval.NOISE

    def test_lucky_memory_is_not_taken_for_a_difference(self, machine):
        pair = [machine.runner(5, placement=0.01, noise=0.001) for _ in range(2)]
        found = ratio_of(timing.race(pair, 10))
        assert found.low < 1 < found.high
        assert found.high - found.low > 0.005

    def test_a_slowdown_is_found_and_its_size_is_right(self, machine):
        pair = [machine.runner(ms, noise=0.05, placement=0.003) for ms in (8, 8.5)]
        found = ratio_of(timing.race(pair, 20))
        assert found.low < 8.5 / 8 < found.high
        assert found.low > 1.05

    def test_a_copy_against_itself_holds_one_within_two_percent(self, monkeypatch):
        held = 0
        for seed in range(12):
            machine = FakeMachine(seed)
            monkeypatch.setattr(timing, "clock_ns", machine.clock)
            pair = [machine.runner(50, noise=0.03, placement=0.004) for _ in range(2)]
            found = ratio_of(timing.race(pair, 20))
            assert (found.high - found.low) / 2 < 0.02
            held += found.low <= 1 <= found.high
        assert held >= 11

    def test_a_ratio_comes_from_both_orders(self):
        rounds = (([2.0, 8.0], [2.0, 2.0], [1.0, 3.0]), ([2.0, 6.0],))
        race = timing.Race(((), ()), rounds)
        assert np.exp(race.log_ratios(1)[0]) == pytest.approx([2.0])
        assert np.exp(race.log_ratios(1)[1]) == pytest.approx([3.0])

    @pytest.mark.parametrize("count", [1, 2, 3])
    def test_each_has_every_turn_equally_often(self, count):
        orders = [timing.order_of_pass(number, count) for number in range(4 * count)]
        assert all(sorted(order) == list(range(count)) for order in orders)
        for turn in range(count):
            assert len({sum(o[turn] == i for o in orders) for i in range(count)}) == 1

    def test_the_order_alternates(self):
        assert [timing.order_of_pass(n, 2) for n in range(4)] == [[0, 1], [1, 0], [0, 1], [1, 0]]

    @pytest.mark.parametrize("seconds", [1, 5, 20])
    def test_it_takes_the_time_it_is_given(self, machine, seconds):
        timing.race([machine.runner(7), machine.runner(9)], seconds)
        assert seconds <= machine.now_ns / 1e9 <= 1.25 * seconds + 0.5

    def test_longer_means_more_samples(self, machine):
        short, long = (timing.race([machine.runner(7)], seconds) for seconds in (1, 10))
        assert len(long.samples_ms[0]) > 5 * len(short.samples_ms[0])

    def test_blocks_hold_several_calls_of_a_fast_network_and_one_of_a_slow_one(self, machine):
        fast = timing.race([machine.runner(1), machine.runner(1)], 20)
        assert len(fast.samples_ms[0]) == 80 * sum(map(len, fast.rounds))
        slow = timing.race([machine.runner(500), machine.runner(500)], 20)
        assert len(slow.samples_ms[0]) == sum(map(len, slow.rounds))

    def test_however_slow_there_are_enough_rounds(self, machine):
        found = timing.race([machine.runner(5000), machine.runner(5000)], 0.1)
        assert len(found.rounds) == timing.MIN_ROUNDS
        assert all(len(passes) == 1 for passes in found.rounds)

    def test_runners_move_before_each_round(self, machine):
        runner = machine.runner(5)
        found = timing.race([runner], 20)
        assert machine.moves(runner) == len(found.rounds) == timing.MAX_ROUNDS

    def test_the_first_of_a_round_is_as_warm_as_any_first(self):
        log = []

        def runner(name):
            return timing.Runner(lambda: log.append(name), lambda: log.append("move"))

        timing.race([runner("a"), runner("b")], 1e-9)
        text = "".join(name[0] for name in log)
        rounds = text.split("mm")[1:]
        assert rounds == ["bbaaab", "aabbba"] * 2 + ["bbaaab"]

    def test_short_measurements_have_many_pairs_too(self, machine):
        found = timing.race([machine.runner(1, moving_ms=0), machine.runner(1, moving_ms=0)], 1)
        assert sum(map(len, found.rounds)) >= 40

    def test_the_warm_up_is_shared_and_long(self, machine):
        moved_at = []
        calls = machine.runner(5)
        runner = timing.Runner(calls.call, lambda: moved_at.append(machine.now_ns / 1e9))
        timing.race([calls, runner], 20)
        assert 1 <= moved_at[0] < 1.1

    def test_costly_moves_make_fewer_rounds(self, machine):
        found = timing.race([machine.runner(5, moving_ms=600)], 20)
        assert timing.MIN_ROUNDS <= len(found.rounds) < timing.MAX_ROUNDS

    def test_progress_is_told_between_rounds_only(self, machine):
        told = []
        found = timing.race([machine.runner(5)], 3, told.append)
        assert told == [(i + 1) / len(found.rounds) for i in range(len(found.rounds))]

    def test_calls_run_in_inference_mode_and_moves_do_not(self):
        modes = {"call": set(), "move": set()}
        runner = timing.Runner(
            lambda: modes["call"].add(torch.is_inference_mode_enabled()),
            lambda: modes["move"].add(torch.is_inference_mode_enabled()),
        )
        timing.race([runner], 0.01)
        assert modes == {"call": {True}, "move": {False}}

    def test_an_interrupt_comes_through_and_all_is_given_back(self):
        def interrupted():
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            timing.race([timing.Runner(interrupted, lambda: None)], 1)
        assert gc.isenabled()
        assert not torch.is_inference_mode_enabled()

    def test_a_collector_that_was_off_stays_off(self):
        gc.disable()
        try:
            timing.race([timing.Runner(lambda: None, lambda: None)], 0.01)
            assert not gc.isenabled()
        finally:
            gc.enable()


class TestReport:
    def test_json_has_exactly_the_promised_keys(self, digits_file):
        report = compare_speed([digits_file], **QUICK).to_json()
        assert json.loads(json.dumps(report, allow_nan=False)) == report
        assert list(report) == ["environment", "runs", "comparisons"]
        host, own = report["runs"]
        assert list(own) == [
            *("target", "engine", "device", "batch", "median_ms", "p5_ms", "p95_ms", "samples_ms"),
            *("parameters", "macs", "file_bytes", "provider", "weights"),
        ]
        assert host["target"] == "digits (untouched host)"
        assert own["target"] == str(digits_file)
        (comparison,) = report["comparisons"]
        assert set(comparison) == {
            *("target", "baseline", "ratio", "interval95", "verdict", "engine", "device", "batch")
        }
        assert comparison["target"] == own["target"]
        assert comparison["baseline"] == host["target"]
        low, high = comparison["interval95"]
        assert low <= high
        assert own["p5_ms"] <= own["median_ms"] <= own["p95_ms"]
        assert own["median_ms"] == pytest.approx(np.median(own["samples_ms"]), abs=1e-4)

    def test_what_it_costs_on_paper_stands_beside_the_times(self, digits_file):
        host, own = compare_speed([digits_file], **QUICK).runs
        model = attnsurgeon.load_model(digits_file)
        assert own.parameters == sum(p.numel() for p in model.parameters()) > host.parameters
        assert own.macs == multiply_adds(model, (IMAGE,)) > host.macs > 0
        assert own.file_bytes == digits_file.stat().st_size
        assert host.file_bytes is None

    def test_of_several_targets_the_first_is_the_baseline(self, digits_file):
        report = compare_speed(["digits", digits_file, digits_file], **QUICK)
        assert [run.target for run in report.runs] == ["digits", *[str(digits_file)] * 2]
        assert [c.baseline for c in report.comparisons] == ["digits", "digits"]

    def test_a_plain_name_is_timed_alone_and_said_to_be_random(self):
        report = compare_speed(["digits"], **QUICK)
        assert report.comparisons == ()
        assert [run.weights for run in report.runs] == ["random"]
        assert "digits has random weights" in report.environment["notes"]

    def test_the_environment_says_where_it_ran(self):
        found = compare_speed(["digits"], **QUICK).environment
        assert found["torch"] == torch.__version__.partition("+")[0]
        assert found["onnxruntime"] == onnxruntime.__version__
        assert found["threads"] == 1
        assert found["device"] == "cpu"
        assert found["gpu"] is None
        assert found["cpu"]
        assert found["seconds"] == QUICK["seconds"]
        assert "0.25 to 0.75" in found["gates"]

    @pytest.mark.skipif(not hasattr(os, "getloadavg"), reason="the system does not tell its load")
    def test_a_busy_machine_is_said_to_be_one(self, monkeypatch):
        for load, doubts in ((0.0, 0), (99.0, 1)):
            monkeypatch.setattr(os, "getloadavg", lambda load=load: (load, 0, 0))
            found = environment.describe(torch.device("cpu"), 1, 1.0, [])
            assert found["load_average"] == load
            assert len(found["notes"]) == doubts

    def test_progress_rises_from_0_to_1(self):
        told = []
        compare_speed(
            ["digits"], batches=(1, 2), **QUICK, progress=lambda *words: told.append(words)
        )
        shares = [share for _, share in told]
        assert shares == sorted(shares)
        assert (shares[0], shares[-1]) == (0.0, 1.0)
        texts = list(dict.fromkeys(text for text, _ in told))
        assert texts == [
            "reading the targets",
            "eager, batch 1: preparing digits",
            "eager, batch 1: measuring",
            "eager, batch 2: preparing digits",
            "eager, batch 2: measuring",
            "done",
        ]

    def test_an_interrupt_leaves_nothing(self, tmp_path, monkeypatch):
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))

        def interrupt(text, share):
            if share > 0:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            compare_speed(["digits"], **QUICK, progress=interrupt)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("cpu_clock")
class TestPlantedDifferences:
    def test_a_network_with_a_third_more_work_is_found_out(self):
        plain, slow = Tiny(work=12), Tiny(work=16)
        (found,) = compare_speed(
            [plain, slow], **{**QUICK, "seconds": 1}, input_size=(48, 48)
        ).comparisons
        assert found.interval95[0] > 1.1
        assert 1.2 < found.ratio < 1.45
        assert found.verdict.startswith("+")

    def test_and_the_other_way_round(self):
        slow, plain = Tiny(work=16), Tiny(work=12)
        (found,) = compare_speed(
            [slow, plain], **{**QUICK, "seconds": 1}, input_size=(48, 48)
        ).comparisons
        assert found.interval95[1] < 0.9
        assert found.verdict.startswith("-")

    def test_a_file_against_itself_is_the_same(self, digits_file):
        (found,) = compare_speed([digits_file, digits_file], **{**QUICK, "seconds": 1}).comparisons
        # A 95 % interval misses once in twenty times: a test may not, so it is given some air.
        low, high = found.interval95
        assert low - 0.05 < 1 < high + 0.05
        assert found.ratio == pytest.approx(1, abs=0.1)


class TestOptions:
    def test_batches(self, spied):
        report = compare_speed([spied], example=IMAGE, batches=(1, 3, 1), **QUICK)
        assert [run.batch for run in report.runs] == [1, 3]
        assert {seen["shape"] for seen in Spy.seen} == {(1, 3, 32, 32), (3, 3, 32, 32)}
        assert report.runs[0].macs == report.runs[1].macs

    def test_multiply_adds_are_for_one_image_whatever_the_first_batch(self, spied):
        runs = [
            compare_speed([spied], example=IMAGE, batches=b, **QUICK).runs for b in ((1,), (4,))
        ]
        assert runs[0][0].macs == runs[1][0].macs > 0

    def test_input_size(self, spied):
        small = compare_speed([spied], **QUICK, input_size=(16, 24))
        assert {seen["shape"] for seen in Spy.seen} == {(1, 3, 16, 24)}
        large = compare_speed([spied], **QUICK, input_size=(32, 24))
        assert large.runs[0].macs > small.runs[0].macs

    def test_threads_are_set_and_given_back(self, spied):
        before = torch.get_num_threads()
        try:
            torch.set_num_threads(1)
            report = compare_speed([spied], example=IMAGE, **{**QUICK, "threads": 2})
            assert {seen["threads"] for seen in Spy.seen if not seen["grad"]} == {2}
            assert report.environment["threads"] == 2
            assert torch.get_num_threads() == 1
            assert compare_speed(["digits"], seconds=0.1).environment["threads"] == 1
        finally:
            torch.set_num_threads(before)

    def test_seconds(self, digits_file):
        short, long = (
            compare_speed([digits_file], **{**QUICK, "seconds": s}).runs[0] for s in (0.05, 0.8)
        )
        assert len(long.samples_ms) > len(short.samples_ms)

    def test_device(self):
        assert environment.find_device("cpu") == torch.device("cpu")
        expected = "cuda" if torch.cuda.is_available() else "cpu"
        assert environment.find_device("auto").type == expected
        report = compare_speed(["digits"], **QUICK)
        assert {run.device for run in report.runs} == {"cpu"}

    def test_example(self):
        report = compare_speed([Tiny(channels=5)], example=torch.zeros(1, 5, 9, 9), **QUICK)
        assert report.runs[0].macs == 9 * 9 * 9 * 8 * (5 + 8) + 8 * 4

    def test_every_engine_runs_each_batch(self):
        report = compare_speed(
            [Tiny()], engines=("torchscript", "eager", "eager"), batches=(1, 2),
            input_size=(20, 24), **QUICK,
        )  # fmt: skip
        assert [(run.engine, run.batch) for run in report.runs] == [
            *(("torchscript", 1), ("torchscript", 2), ("eager", 1), ("eager", 2))
        ]


class TestWhatIsLent:
    def test_a_module_stays_as_it_was(self):
        operated = attnsurgeon.insert_attention(Residual().train(), "gc", example=IMAGE)
        before = {key: tensor.clone() for key, tensor in operated.state_dict().items()}
        places = [p.data_ptr() for p in operated.parameters()]
        report = compare_speed([operated], engines=("eager", "torchscript"), **QUICK)
        assert report.runs[0].target == "Residual (untouched host)"
        assert report.runs[1].target == "Residual"
        assert report.runs[1].weights == "given"
        assert operated.training
        assert all(torch.equal(t, before[key]) for key, t in operated.state_dict().items())
        assert [p.data_ptr() for p in operated.parameters()] == places
        assert not any(gate.any() for gate in attnsurgeon.gates(operated).values())

    def test_random_state_grad_mode_and_collector(self, spied):
        torch.manual_seed(7)
        expected = torch.rand(3)
        torch.manual_seed(7)
        compare_speed([spied], example=IMAGE, **QUICK)
        assert torch.equal(torch.rand(3), expected)
        assert torch.is_grad_enabled()
        assert gc.isenabled()
        timed = Spy.seen[-1]
        assert timed == {
            **{"shape": (1, 3, 32, 32), "threads": 1, "grad": False},
            **{"collector": False, "training": False},
        }

    def test_threads_come_back_after_an_error_too(self):
        before = torch.get_num_threads()
        with pytest.raises(BadOption):
            compare_speed([Tiny(), Tiny(classes=5)], **{**QUICK, "threads": before + 1})
        assert torch.get_num_threads() == before


class TestTargets:
    def test_gates_are_open_and_each_time_the_same(self, digits_file):
        host, own = targets.read_targets([digits_file])
        again = targets.read_targets([digits_file])[1]
        values = [gate.item() for gate in attnsurgeon.gates(own.module).values()]
        assert values
        assert all(0.25 <= value <= 0.75 for value in values)
        assert len(set(values)) == len(values)
        assert values == [gate.item() for gate in attnsurgeon.gates(again.module).values()]
        assert attnsurgeon.gates(host.module) == {}

    def test_all_see_the_same_inputs(self):
        inputs = targets.make_inputs((IMAGE, torch.arange(3)[None], None), 2, torch.device("cpu"))
        again = targets.make_inputs((IMAGE, torch.arange(3)[None], None), 2, torch.device("cpu"))
        assert torch.equal(inputs[0], again[0])
        assert inputs[0].std() > 0.5
        assert inputs[1].tolist() == [[0, 1, 2], [0, 1, 2]]
        assert inputs[2] is None
        target = targets.Target("x", (IMAGE.half(), torch.zeros(1, 3).long(), None), "given")
        assert targets.cast_inputs(inputs, target)[0].dtype == torch.float16

    def test_the_host_has_the_files_own_weights(self, digits_file):
        host, own = targets.read_targets([digits_file])
        state = own.module.state_dict()
        assert all(torch.equal(t, state[key]) for key, t in host.module.state_dict().items())

    def test_half_precision_against_full(self):
        runs = compare_speed([Tiny(), Tiny().bfloat16()], input_size=(16, 16), **QUICK).runs
        assert len(runs) == 2


class TestExportedFiles:
    def test_onnx_alone(self, tiny_onnx):
        report = compare_speed([tiny_onnx], engines=("onnxruntime",), **QUICK, input_size=(20, 24))
        (run,) = report.runs
        assert report.comparisons == ()
        assert run.provider == "CPUExecutionProvider"
        assert run.file_bytes >= tiny_onnx.stat().st_size
        assert (run.parameters, run.macs) == (None, None)
        assert "gates, if it has any, as they are in the file" in report.environment["notes"][0]

    def test_data_beside_the_file_counts(self, tmp_path):
        import onnx

        path = tmp_path / "apart.onnx"
        write_onnx(Tiny().eval(), (torch.randn(2, 3, 20, 24),), path)
        onnx.save(
            onnx.load(path), path, save_as_external_data=True, location="apart.data",
            size_threshold=200,
        )  # fmt: skip
        report = compare_speed([path], engines=("onnxruntime",), input_size=(8, 8), **QUICK)
        both = path.stat().st_size + (tmp_path / "apart.data").stat().st_size
        assert report.runs[0].file_bytes == both > path.stat().st_size

    def test_torchscript_tells_its_size(self, tiny_script):
        report = compare_speed([tiny_script], engines=("torchscript",), **QUICK)
        (run,) = report.runs
        model = Tiny()
        assert run.macs == multiply_adds(model, (torch.zeros(1, 3, 20, 24),))
        assert run.parameters == sum(p.numel() for p in model.parameters())
        assert run.provider is None

    def test_gates_of_our_own_torchscript_are_opened(self, tmp_path):
        operated = attnsurgeon.insert_attention(Residual(), "se", example=IMAGE)
        scripted = make_torchscript(operated.eval(), (IMAGE,))
        for recipe, is_open in (("{}", True), ("", False)):
            path = tmp_path / f"{is_open}.pt"
            scripted.save(str(path), _extra_files={"attnsurgeon": recipe, "input_size": SIZES})
            (target,) = targets.read_targets([path])
            gates = [p for n, p in target.module.named_parameters() if n.endswith(".openness")]
            assert [bool(gate.any()) for gate in gates] == [is_open]
            assert not is_open or 0.25 <= gates[0].item() <= 0.75
            notes = environment.describe(torch.device("cpu"), 1, 1.0, [target])["notes"]
            assert any("gates, if it has any, as they are" in note for note in notes) != is_open

    def test_a_network_against_its_export(self, tiny_onnx):
        report = compare_speed([tiny_onnx, Tiny()], engines=("onnxruntime",), **QUICK)
        assert [run.provider for run in report.runs] == ["CPUExecutionProvider"] * 2
        assert len(report.comparisons) == 1

    def test_a_size_that_one_of_them_knows_goes_for_all(self, tiny_script):
        known, guessed = (
            targets.Target("x", (torch.zeros(1, 3, *size),), "file", is_sized=is_sized)
            for size, is_sized in (((20, 24), True), ((224, 224), False))
        )
        for pair in ([known, guessed], [guessed, known]):
            assert targets.common_example(pair, None)[0].shape == (1, 3, 20, 24)

    def test_fixed_axes(self, tmp_path):
        path = tmp_path / "fixed.onnx"
        write_onnx(Tiny().eval(), (torch.randn(1, 3, 20, 24),), path, dynamic=False)
        ort = {"engines": ("onnxruntime",), **QUICK}
        assert compare_speed([path], **ort).runs[0].batch == 1
        for wrong in ({"batches": (1, 2)}, {"input_size": (24, 24)}):
            with pytest.raises(BadOption, match="1x3x20x24 only"):
                compare_speed([path], **ort, **wrong)


class TestOnnxRuntime:
    def test_idle_sessions_hold_still_and_threads_are_set(self, tiny_onnx):
        options = exported.session_for(tiny_onnx, threads=2).get_session_options()
        assert options.get_session_config_entry("session.force_spinning_stop") == "1"
        assert options.intra_op_num_threads == 2

    def test_a_move_makes_a_new_session(self, tiny_onnx, monkeypatch):
        made = []

        class Session:
            def __init__(self, path, **options):
                made.append(options)
                self.number = len(made)

            def get_providers(self):
                return ["CPUExecutionProvider"]

            def get_inputs(self):
                return []

            def run(self, names, feed):
                return self.number

        (target,) = targets.read_targets([tiny_onnx])
        monkeypatch.setattr(engines, "session_for", Session)
        place = engines.Place(torch.device("cpu"), 3, tiny_onnx.parent)
        runner = engines.get("onnxruntime").prepare(target, (), place)
        assert runner.call() == 1
        runner.move()
        assert runner.call() == 2
        assert made == [{"threads": 3, "provider": "CPUExecutionProvider"}] * 2

    def test_a_fallback_fails(self, tiny_onnx, monkeypatch):
        monkeypatch.setattr(
            onnxruntime.InferenceSession, "get_providers", lambda self: ["AzureExecutionProvider"]
        )
        with pytest.raises(EngineUnavailable, match="fell back to AzureExecutionProvider"):
            compare_speed([tiny_onnx], engines=("onnxruntime",), **QUICK)

    def test_no_bfloat16(self):
        with pytest.raises(EngineUnavailable, match="no bfloat16 from Python: leave Tiny"):
            compare_speed(
                [Tiny().bfloat16()], engines=("onnxruntime",), input_size=(16, 16), **QUICK
            )

    def test_no_cuda_provider(self):
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime-gpu is installed")
        with pytest.raises(EngineUnavailable, match="pip install onnxruntime-gpu"):
            engines.get("onnxruntime").check(torch.device("cuda", 0))

    def test_all_batches_run_one_export(self, monkeypatch):
        written = []

        def counted(model, inputs, path):
            written.append(path)
            write_onnx(model, inputs, path)

        monkeypatch.setattr(engines, "write_onnx", counted)
        report = compare_speed(
            [Tiny(), Tiny()], engines=("onnxruntime",), batches=(1, 3), input_size=(20, 24), **QUICK
        )
        assert len(report.runs) == 4
        assert len(set(written)) == len(written) == 2


class TestCompile:
    def test_it_compiles_once_and_is_timed(self):
        from torch._dynamo.utils import counters

        before = counters["stats"]["unique_graphs"]
        try:
            report = compare_speed(
                [Tiny(), Tiny()], engines=("compile",), input_size=(8, 8), **QUICK
            )
        except EngineUnavailable as error:
            pytest.skip(str(error))
        assert len(report.runs) == 2
        assert counters["stats"]["unique_graphs"] == before + 2  # moving compiles nothing anew

    def test_a_network_left_uncompiled_fails(self):
        class Shy(Tiny):
            @torch.compiler.disable
            def forward(self, x):
                return super().forward(x)

        with pytest.raises(EngineUnavailable, match=r"Shy (uncompiled)?"):
            compare_speed([Shy()], engines=("compile",), input_size=(8, 8), **QUICK)

    def test_no_compiler(self, monkeypatch):
        def broken(function, **options):
            def raises(*inputs):
                raise RuntimeError("InvalidCxxCompiler: No working C++ compiler found")

            return raises

        monkeypatch.setattr(torch, "compile", broken)
        with pytest.raises(EngineUnavailable, match=r"install g\+\+"):
            compare_speed([Tiny()], engines=("compile",), input_size=(8, 8), **QUICK)


class TestEngines:
    def test_their_names(self):
        assert bench.engine_names() == ["compile", "eager", "onnxruntime", "torchscript"]
        # the command line knows them without torch, whose import --help must not wait for
        assert sorted(cli_bench.ENGINES) == bench.engine_names()

    @pytest.mark.parametrize("name", ["eager", "torchscript"])
    def test_a_move_takes_new_memory_and_computes_the_same(self, name, tmp_path):
        (target,) = targets.read_targets([Tiny()])
        inputs = (torch.randn(1, 3, 20, 24),)
        place = engines.Place(torch.device("cpu"), 1, tmp_path)
        runner = engines.get(name).prepare(target, inputs, place)
        with torch.inference_mode():
            before = runner.call()
        places = {p.data_ptr() for p in target.module.parameters()}
        runner.move()
        assert places.isdisjoint({p.data_ptr() for p in target.module.parameters()})
        with torch.inference_mode():
            assert torch.equal(runner.call(), before)

    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("name", ["eager", "torchscript"])
    def test_cuda_is_timed_by_events(self, name, digits_file):
        report = compare_speed([digits_file], engines=(name,), device="cuda", seconds=0.3)
        assert {run.device for run in report.runs} == {"cuda:0"}
        assert all(run.median_ms > 0 for run in report.runs)
        assert report.environment["gpu"]


BAD_OPTIONS = [
    ({"batches": (1, 0)}, BadOption, "--batch must be at least 1, not 0"),
    ({"batches": ()}, BadOption, "--batch"),
    ({"threads": 0}, BadOption, "--threads must be at least 1, not 0"),
    ({"seconds": 0}, BadOption, "--seconds must be above 0, not 0"),
    ({"seconds": -1.0}, BadOption, "--seconds"),
    ({"seconds": float("nan")}, BadOption, "--seconds"),
    ({"seconds": float("inf")}, BadOption, "--seconds"),
    ({"input_size": (0, 32)}, BadOption, "--input-size must be at least 1"),
    ({"engines": ("onnx",)}, UnknownName, "no engine is called 'onnx'; did you mean 'onnxruntime'"),
    ({"engines": ()}, BadOption, "--engine"),
    ({"device": "tpu"}, BadOption, "--device takes auto, cpu, cuda or cuda:N, not 'tpu'"),
    ({"device": "cuda:"}, BadOption, "--device"),
    ({"device": "cuda:x"}, BadOption, "--device"),
    ({"device": "cudaX"}, BadOption, "--device"),
    ({"targets": ()}, BadOption, "at least one target"),
]


class TestBadInput:
    @pytest.mark.parametrize(("wrong", "kind", "words"), BAD_OPTIONS)
    def test_options_are_refused_before_anything_is_loaded(self, wrong, kind, words, monkeypatch):
        def too_late(*args, **kwargs):
            raise AssertionError("a target was read")

        monkeypatch.setattr("attnsurgeon.bench.compare.read_targets", too_late)
        options = {"targets": ["digits"], **QUICK, **wrong}
        with pytest.raises(kind, match=words) as caught:
            compare_speed(**options)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)

    def test_an_engine_without_cuda_is_refused_before_another_one_is_timed(self, monkeypatch):
        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            pytest.skip("onnxruntime-gpu is installed")
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
        with pytest.raises(EngineUnavailable, match="no CUDAExecutionProvider"):
            compare_speed(["digits"], engines=("eager", "onnxruntime"), device="cuda:0")

    @pytest.mark.parametrize("device", ["cuda", "cuda:1"])
    def test_no_cuda(self, device, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        with pytest.raises(EngineUnavailable, match="no CUDA device here; give --device cpu"):
            compare_speed(["digits"], device=device)

    def test_too_few_cuda_devices(self, monkeypatch):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
        with pytest.raises(EngineUnavailable, match="no CUDA device 2 here; there are 2"):
            environment.find_device("cuda:2")
        assert environment.find_device("cuda:1") == torch.device("cuda", 1)

    @pytest.mark.parametrize(
        ("name", "content", "kind", "words"),
        [
            ("resnet81", None, UnknownName, "did you mean 'resnet18'"),
            ("gone.safetensors", None, BadFile, "there is no file"),
            ("gone.onnx", None, BadFile, "there is no file"),
            ("gone.pt", None, BadFile, "there is no file"),
            ("empty.onnx", b"", BadFile, "is empty"),
            ("noise.safetensors", b"x" * 99, BadFile, "not a whole safetensors file"),
            ("noise.onnx", b"x" * 99, BadFile, "onnxruntime cannot read"),
            ("noise.pt", b"x" * 99, BadFile, "is no TorchScript file"),
            ("noise.pth", b"x" * 99, BadFile, "cannot be timed: a target is"),
        ],
    )
    def test_targets(self, tmp_path, name, content, kind, words):
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        suffix = Path(name).suffix
        engine = {".onnx": "onnxruntime", ".pt": "torchscript"}.get(suffix, "eager")
        with pytest.raises(kind, match=words) as caught:
            compare_speed([path if suffix else name], engines=(engine,), **QUICK)
        assert caught.value.exit_code == 2

    @pytest.mark.parametrize("engine", ["eager", "torchscript", "compile"])
    def test_an_onnx_file_runs_on_onnxruntime_only(self, tiny_onnx, engine):
        with pytest.raises(BadOption, match="give --engine onnxruntime alone"):
            compare_speed([tiny_onnx], engines=("onnxruntime", engine), **QUICK)

    def test_a_torchscript_file_runs_on_torchscript_only(self, tiny_script):
        with pytest.raises(BadOption, match="give --engine torchscript alone"):
            compare_speed([tiny_script], **QUICK)

    @pytest.mark.parametrize(
        ("other", "words"),
        [
            (Tiny(channels=1), "takes 1-channel images, Tiny takes 3-channel images"),
            (Tiny(classes=5), "returns 1x5, Tiny returns 1x4"),
        ],
    )
    def test_targets_of_different_kinds(self, other, words):
        with pytest.raises(BadOption, match=f"{words}: they cannot be compared"):
            compare_speed([Tiny(), other], input_size=(16, 16), **QUICK)

    def test_a_network_does_not_run_at_that_size(self, tmp_path):
        with pytest.raises(HostUnusable, match="give another --input-size") as caught:
            compare_speed(["alexnet"], input_size=(8, 8), **QUICK)
        assert caught.value.exit_code == 2
        assert "(1, 3, 8, 8)" in str(caught.value)

    def test_a_file_of_a_network_of_ones_own(self, tmp_path):
        path = tmp_path / "own.safetensors"
        own = attnsurgeon.insert_attention(Residual(), "se", example=torch.zeros(1, 3, 16, 16))
        attnsurgeon.save_model(own, path)
        with pytest.raises(HostUnusable, match="your own Residual"):
            compare_speed([path], **QUICK)


class Residual(nn.Module):
    """The smallest host that is not torchvision's."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.conv(x) + x

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.block = self.Block()

    def forward(self, x):
        return self.block(self.stem(x)).mean((2, 3))

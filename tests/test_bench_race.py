"""The race: whatever the machine does hits all alike."""

import dataclasses
import gc

import numpy as np
import pytest
import torch

from attnsurgeon.bench import (
    interval,
    ratios,
    rounds,
    timing,
)


class FakeMachine:
    """A clock that runners push forward, with all that a real machine does to them."""

    def __init__(self, seed=0):
        self.now_ns = self.waited_ns = 0
        self.random = np.random.default_rng(seed)
        self.last = None

    def clock(self):
        return self.now_ns

    def waited(self):
        return self.waited_ns

    def runner(
        self,
        ms,
        *,
        drift=0.0,
        switch_ms=0.0,
        noise=0.0,
        placement=0.0,
        moving_ms=1.0,
        held_up=0.0,
        told=0.0,
    ):
        """Return a runner of `ms` a call.

        Args:
            drift: share that all calls become slower per second.
            switch_ms: what the first call after another runner's costs on top.
            noise: standard deviation of a call, relative.
            held_up: share of the calls that another program on the core makes 2.2 times as long.
            told: ms of waiting that the machine accounts for each ms so lost.
            placement: standard deviation of what a move does to all calls until the next.
        """
        state = {"placed": 1.0, "moves": 0}
        me = object()

        def call():
            cost = ms * state["placed"] * (1 + drift * self.now_ns / 1e9)
            cost *= 1 + noise * self.random.standard_normal()
            if self.random.random() < held_up:
                self.waited_ns += round(1e6 * 1.2 * cost * told)
                cost *= 2.2
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
    monkeypatch.setattr(timing, "waited_ns", made.waited)
    return made


def ratio_of(found):
    return ratios.ratio_of(found, 1)


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

    def test_calls_of_two_kinds_do_not_hide_a_difference(self, monkeypatch):
        """As beside another program: pairs would be off by several percent."""
        by_pairs, fastest = [], []
        for seed in range(8):
            machine = FakeMachine(seed)
            monkeypatch.setattr(timing, "clock_ns", machine.clock)
            pair = [machine.runner(ms, noise=0.04, held_up=0.45) for ms in (60, 63)]
            found = timing.race(pair, 20)
            assert found.is_disturbed(0)
            by_pairs.append(np.exp(np.median(np.concatenate(found.log_ratios(1)))))
            fastest.append(ratio_of(found))
        assert all(found.ratio == pytest.approx(1.05, abs=0.02) for found in fastest)
        assert sum(found.low <= 1.05 <= found.high for found in fastest) >= 7
        assert np.std(by_pairs) > 2 * np.std([found.ratio for found in fastest])

    @pytest.mark.parametrize("told", [1.0, 1.9])
    @pytest.mark.parametrize("more", [0.45, 0.7])
    def test_waiting_that_is_told_is_taken_off(self, monkeypatch, told, more):
        """Whoever waits more often, and however many threads wait at the same time."""
        errors, quarters = [], []
        for seed in range(8):
            machine = FakeMachine(seed)
            monkeypatch.setattr(timing, "clock_ns", machine.clock)
            monkeypatch.setattr(timing, "waited_ns", machine.waited)
            pair = [
                machine.runner(ms, noise=0.04, held_up=share, told=told)
                for ms, share in ((60, 0.45), (63, more))
            ]
            found = timing.race(pair, 20)
            assert ratios.compared(found).part == interval.MIDDLE
            errors.append(ratio_of(found).ratio - 1.05)
            blind = dataclasses.replace(found, spans=())
            assert ratios.compared(blind).part == interval.FASTEST_QUARTER
            quarters.append(ratio_of(blind).ratio - 1.05)
        assert np.abs(errors).max() < 0.015
        assert np.square(errors).mean() < np.square(quarters).mean()

    @pytest.mark.parametrize("told", [(1.0, 1.1), (0.9, 1.4), (1.0, 2.2)])
    def test_who_accounts_for_more_waiting_is_not_taken_for_faster(self, machine, told):
        """A network of small operators and one of large ones wait with other numbers of threads."""
        for _ in range(4):
            pair = [machine.runner(60, noise=0.04, held_up=0.45, told=each) for each in told]
            found = timing.race(pair, 20)
            assert ratios.compared(found).part == interval.MIDDLE
            assert 0 < ratios.compared(found).unsure < 0.01
            ratio = ratio_of(found)
            assert ratio.ratio == pytest.approx(1, abs=0.015)
            assert ratio.low <= 1 <= ratio.high

    @pytest.mark.parametrize("held_up", [0.5, 0.7])
    def test_rounds_of_one_block_are_seen_to_be_disturbed(self, machine, held_up):
        pair = [machine.runner(1500, noise=0.02, held_up=held_up) for _ in range(2)]
        found = timing.race(pair, 20)
        assert {len(passes) for passes in found.rounds} == {1}
        assert found.is_disturbed()
        quiet = timing.race([machine.runner(1500, noise=0.02) for _ in range(2)], 20)
        assert not quiet.is_disturbed()

    @staticmethod
    def with_spans(calls, waits, passes=8):
        """Return a race of two whose spans are these, again and again."""
        rows = [
            [rounds.Span(call, wait)] * 2 for call, wait in zip(calls, waits, strict=True)
        ] * passes
        spans = (tuple(rows),) * 5
        blocks = tuple(tuple([[row[0].call_ms] * 2 for row in part]) for part in spans)
        return rounds.Race(((), ()), blocks, spans=spans)

    @pytest.mark.parametrize(
        ("calls", "waits"),
        [
            ([10.0, 20.0], [5.0, 0.0]),  # who waits less takes longer
            ([10.0, 20.0], [0.0, 1.0]),  # a ms of waiting would cost ten
            ([10.0, 20.0, 10.0, 20.0], [0.0, 10.0, 10.0, 0.0]),  # it has nothing to do with it
            ([10.0, 20.0], [20.0, 30.0]),  # more than there is
            ([10.0, 20.0], [0.0, 0.0]),  # nobody waited
        ],
    )
    def test_waits_that_make_no_sense_are_not_taken_off(self, calls, waits):
        race = self.with_spans(calls, waits)
        assert race.is_disturbed()
        assert ratios.compared(race) == ((race,), interval.FASTEST_QUARTER, 0.0)

    def test_waits_that_make_sense_are(self):
        race = self.with_spans([10.0, 20.0], [0.5, 10.5])
        (left,), part, _ = ratios.compared(race)
        assert part == interval.MIDDLE
        assert left.log_blocks(0)[0] == pytest.approx([np.log(9.5)] * 16)

    def test_an_interrupt_before_the_spans_were_noted_leaves_the_quarter(self):
        race = self.with_spans([10.0, 20.0], [0.5, 10.5])
        race = dataclasses.replace(race, spans=race.spans[:-1])
        assert ratios.compared(race).part == interval.FASTEST_QUARTER

    def test_a_thread_that_ended_or_a_devices_clock_means_no_waiting(self, machine, monkeypatch):
        monkeypatch.setattr(timing, "waited_ns", lambda: -machine.now_ns)
        found = timing.race([machine.runner(10)], 1)
        assert {row[0].waited_ms for passes in found.spans for row in passes} == {0.0}
        monkeypatch.setattr(timing, "waited_ns", machine.clock)
        monkeypatch.setattr(
            timing, "_timed_by_events", lambda call, n, *_: [call() or 1.0 for _ in range(n)]
        )
        runner = dataclasses.replace(machine.runner(10), events=torch.device("cuda"))
        found = timing.race([runner], 1)
        assert {row[0].waited_ms for passes in found.spans for row in passes} == {0.0}

    def test_waits_that_explain_nothing_take_nothing_off(self, machine, monkeypatch):
        random = np.random.default_rng(0)
        monkeypatch.setattr(timing, "waited_ns", lambda: random.integers(10**7))
        pair = [machine.runner(60, noise=0.04, held_up=0.45) for _ in range(2)]
        assert ratios.compared(timing.race(pair, 20)).part == interval.FASTEST_QUARTER

    def test_what_a_quiet_machine_tells_changes_nothing(self, machine):
        pair = [machine.runner(60, noise=0.04, held_up=0.02, told=1.0) for _ in range(2)]
        found = timing.race(pair, 20)
        assert ratios.compared(found) == ((found,), interval.FASTER_HALF, 0.0)

    def test_races_of_which_one_was_disturbed_are_compared_alike(self, machine):
        quiet, loud = (
            timing.race([machine.runner(60, held_up=share, told=1.0) for _ in range(2)], 20)
            for share in (0.0, 0.45)
        )
        assert ratios.compared(loud, loud).part == interval.MIDDLE
        assert ratios.compared(quiet, loud)[:2] == ((quiet, loud), interval.FASTEST_QUARTER)
        assert ratios.ratio_of([quiet, loud], 1).ratio == pytest.approx(1, abs=1e-6)

    def test_drift_alone_disturbs_nothing(self, machine):
        found = timing.race([machine.runner(10), machine.runner(10, drift=0.1)], 10)
        assert not found.is_disturbed(1)

    def test_a_ratio_comes_from_both_orders(self):
        passes = (([2.0, 8.0], [2.0, 2.0], [1.0, 3.0]), ([2.0, 6.0],))
        race = rounds.Race(((), ()), passes)
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
        assert len(fast.samples_ms[0]) == 40 * sum(map(len, fast.rounds))
        slow = timing.race([machine.runner(500), machine.runner(500)], 20)
        assert len(slow.samples_ms[0]) == sum(map(len, slow.rounds))

    def test_however_slow_there_are_enough_rounds(self, machine):
        found = timing.race([machine.runner(5000), machine.runner(5000)], 0.1)
        assert len(found.rounds) == rounds.MIN_ROUNDS
        assert all(len(passes) == 1 for passes in found.rounds)

    def test_runners_move_before_each_round(self, machine):
        runner = machine.runner(5)
        found = timing.race([runner], 20)
        assert machine.moves(runner) == len(found.rounds) == rounds.MAX_ROUNDS

    def test_the_first_of_a_round_is_as_warm_as_any_first(self):
        log = []

        def runner(name):
            return timing.Runner(lambda: log.append(name), lambda: log.append("move"))

        timing.race([runner("a"), runner("b")], 1e-9)
        text = "".join(name[0] for name in log)
        rounds = text.split("mm")[1:]
        assert len(rounds) >= 5  # more where such short calls do not settle
        assert rounds == (["bbaaab", "aabbba"] * len(rounds))[: len(rounds)]

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
        assert rounds.MIN_ROUNDS <= len(found.rounds) < rounds.MAX_ROUNDS

    def test_progress_is_told_between_rounds_only(self, machine):
        told = []
        found = timing.race([machine.runner(5)], 3, lambda share, found: told.append(share))
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

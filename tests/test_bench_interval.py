"""The interval: as wide as it has to be, and in no more digits than it supports."""

import math

import numpy as np
import pytest

from attnsurgeon.bench import interval


def rounds_of(random, truth, *, rounds=12, passes=8, between=0.005, within=0.03, slower_only=True):
    """Return logs of times of both as a machine makes them: in each round one is in luck."""
    shape = np.abs if slower_only else np.asarray
    both = [
        [
            math.log(ratio) + random.normal(0, between) + shape(random.normal(0, within, passes))
            for _ in range(rounds)
        ]
        for ratio in (truth, 1.0)
    ]
    return both[0], both[1]


class TestInterval:
    def test_three_percent_in_noise_are_found(self):
        random = np.random.default_rng(0)
        found = interval.estimate(*rounds_of(random, 1.03, rounds=16, passes=20, between=0.001))
        assert found.low < 1.03 < found.high
        assert found.low > 1.02
        assert found.high < 1.04

    def test_noise_is_called_noise(self):
        found = interval.estimate(*rounds_of(np.random.default_rng(0), 1.0))
        assert found.low < 1 < found.high
        assert interval.verdict(found) == "not distinguishable from noise"

    @pytest.mark.parametrize("rounds", [5, 16])
    def test_the_truth_is_inside_as_often_as_promised(self, rounds):
        random = np.random.default_rng(1)
        draws = (
            interval.estimate(*rounds_of(random, 1.05, rounds=rounds), seed=i) for i in range(300)
        )
        assert sum(found.low <= 1.05 <= found.high for found in draws) >= 285

    @pytest.mark.parametrize("rounds", [5, 16])
    def test_and_hardly_less_often_where_noise_goes_both_ways(self, rounds):
        random = np.random.default_rng(1)
        both = (rounds_of(random, 1.05, rounds=rounds, slower_only=False) for _ in range(100))
        draws = [interval.estimate(*sides, seed=i) for i, sides in enumerate(both)]
        assert sum(found.low <= 1.05 <= found.high for found in draws) >= 90

    def test_of_few_rounds_it_reaches_beyond_the_extremes(self):
        # Once in sixteen times five rounds are all on one side of the truth, which percentiles
        # of what is drawn from them never leave.
        found = interval.estimate([[0.001], [0.004], [0.006], [0.009], [0.012]], [[0.0]] * 5)
        assert found.low < math.exp(0.001)

    def test_blocks_of_one_round_are_not_taken_for_independent(self):
        # 40 blocks each that agree perfectly within a round say no more than one each.
        random = np.random.default_rng(2)
        wide = interval.estimate(*rounds_of(random, 1, rounds=6, passes=40, between=0.02, within=0))
        assert wide.high - wide.low > 0.02

    def test_disturbed_blocks_do_not_move_it(self):
        own, baseline = rounds_of(np.random.default_rng(3), 1.02, passes=20)
        disturbed = [[5.0, *row[1:]] for row in own]
        before, after = (interval.estimate(side, baseline) for side in (own, disturbed))
        assert after.ratio == pytest.approx(before.ratio, rel=3e-3)

    def test_more_rounds_make_it_narrower(self):
        few, many = (
            interval.estimate(*rounds_of(np.random.default_rng(4), 1, rounds=n)) for n in (5, 40)
        )
        assert many.high - many.low < 0.6 * (few.high - few.low)

    def test_the_same_blocks_give_the_same_interval_and_the_seed_another(self):
        both = rounds_of(np.random.default_rng(5), 1)
        assert interval.estimate(*both) == interval.estimate(*both)
        assert interval.estimate(*both, seed=1) != interval.estimate(*both)

    def test_a_part_of_the_blocks_counts_those_at_its_ends_by_share(self):
        values = np.array([4.0, 1.0, 3.0, 2.0])
        weights = np.array([[1.0, 1, 1, 1], [0, 2, 1, 1]])
        assert interval.trimmed_means(values, weights, (0, 1)) == pytest.approx([2.5, 1.75])
        assert interval.trimmed_means(values, weights, (0, 0.5)) == pytest.approx([1.5, 1.0])
        middle = interval.trimmed_means(values, weights, (0.125, 0.875))
        assert middle == pytest.approx([2.5, (1.5 * 1 + 2 + 0.5 * 3) / 3])

    def test_one_round_has_no_interval(self):
        with pytest.raises(ValueError, match="two rounds"):
            interval.estimate([[0.0, 0.1]], [[0.0, 0.1]])

    @pytest.mark.parametrize(
        ("degrees", "quantile"), [(1, 12.706), (2, 4.303), (4, 2.776), (9, 2.262), (15, 2.131)]
    )
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
            (7.2345, 6.6345, 7.8345, "+620 % [560, 680]"),  # its units are not known
            (1.02, 0.99, 1.05, interval.NOISE),
            (0.98, 0.95, 1.01, interval.NOISE),
            (1.01, 1.0003, 1.03, interval.NOISE),  # its lower end is 0.0 % at the digits it has
            (1.00004, 1.00002, 1.00006, interval.NOISE),
        ],
    )
    def test_verdict_in_words(self, ratio, low, high, words):
        assert interval.verdict(interval.Estimate(ratio, low, high)) == words

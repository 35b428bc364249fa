"""The intervals against closed forms and simulations, and what the verdicts may say."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llmq.statistics import proportions
from llmq.statistics.compare import compare, paired_intervals, verdict
from llmq.statistics.estimates import alone, figure
from llmq.statistics.figures import mean, quantile_stderr, ratio_stderr, stretches
from llmq.statistics.proportions import Table
from llmq.statistics.resampling import cluster_spread, quantile_spread, t_quantile
from llmq.types import Measurement, Samples

quickly = settings(max_examples=40, deadline=None, database=None)
scores = st.floats(-100, 100, allow_nan=False).map(lambda x: round(x, 3))


def shares(gained, lost, both, neither):
    """Paired answers, right or wrong, as (stage, base)."""
    a = [1.0] * gained + [0.0] * lost + [1.0] * both + [0.0] * neither
    b = [0.0] * gained + [1.0] * lost + [1.0] * both + [0.0] * neither
    return tuple(a), tuple(b)


def shares_interval(a, b):
    """The interval of the difference of two shares."""
    return proportions.difference(Table.of(a, b))[1]


def measured(value, better="lower", stderr=0.0, samples=None):
    exact = not (stderr or samples)
    return Measurement("size", "bytes", value, "bytes", better, 1, stderr, "exact", samples, exact=exact)


def test_interval_of_a_mean_of_normal_differences_is_the_t_interval():
    rng = np.random.default_rng(1)
    base = rng.normal(5, 3, 200)
    differences = rng.normal(0.4, 1, 200)
    (low, high), _ = paired_intervals(Samples(tuple(base + differences)), Samples(tuple(base)))
    margin = 1.972 * differences.std(ddof=1) / math.sqrt(200)  # t of 199 degrees of freedom
    assert low == pytest.approx(differences.mean() - margin, abs=0.08 * margin)
    assert high == pytest.approx(differences.mean() + margin, abs=0.08 * margin)


def studentised_by_hand(values, beyond, resamples=20_000):
    """The bootstrap-t interval of a mean, a share `beyond` each end, one resample at a time in plain arithmetic."""
    rng = np.random.default_rng(12)
    n, mean, stderr = len(values), values.mean(), values.std(ddof=1) / math.sqrt(len(values))
    drawn = [rng.choice(values, n) for _ in range(resamples)]
    t = [(d.mean() - mean) / (d.std(ddof=1) / math.sqrt(n)) for d in drawn]
    left, right = np.quantile(t, (beyond, 1 - beyond))
    return mean - right * stderr, mean - left * stderr


def test_interval_of_a_skewed_mean_is_the_studentised_one_where_that_is_wider():
    differences = np.random.default_rng(11).lognormal(0, 1.2, 40)
    (low, high), _ = paired_intervals(Samples(tuple(differences)), Samples((0.0,) * 40))
    # Of 40 samples 40 / 50 is believed: so much of the degrees of freedom, and of 2.5 % beyond each end.
    t = stats.t.interval(0.95, 0.8 * 39, differences.mean(), stats.sem(differences))
    by_hand = studentised_by_hand(differences, 0.8 * 0.025)
    width = t[1] - t[0]
    assert low == pytest.approx(t[0], abs=1e-9)
    assert high == pytest.approx(by_hand[1], abs=0.06 * width)
    assert high > t[1] + 0.1 * width  # or else this would prove nothing


def test_with_many_samples_the_interval_is_that_of_scipys_bca():
    rng = np.random.default_rng(13)
    base = rng.normal(3, 1, 1500)
    differences = rng.exponential(1, 1500)
    interval, _ = paired_intervals(Samples(tuple(base + differences)), Samples(tuple(base)))
    bca = stats.bootstrap((differences,), np.mean, method="BCa", n_resamples=5000, rng=1).confidence_interval
    assert interval == pytest.approx(tuple(bca), abs=0.06 * (bca.high - bca.low))


def test_samples_of_one_document_are_drawn_together():
    """Ten windows of each of 30 documents that all move alike tell no more than 30 windows."""
    rng = np.random.default_rng(14)
    moved = rng.normal(0.2, 1, 30)
    base = rng.normal(0, 1, 300)
    clusters = tuple(int(i) for i in np.repeat(np.arange(30), 10))
    a, b = (Samples(tuple(x), clusters=clusters) for x in (base + np.repeat(moved, 10), base))
    thirty = paired_intervals(Samples(tuple(moved)), Samples((0.0,) * 30))[0]
    assert paired_intervals(a, b)[0] == pytest.approx(thirty, abs=1e-9)
    alone_low, alone_high = paired_intervals(Samples(a.values), Samples(b.values))[0]
    assert alone_high - alone_low < 0.5 * (thirty[1] - thirty[0])


def test_pairing_makes_the_interval_as_narrow_as_the_differences():
    rng = np.random.default_rng(2)
    base = rng.normal(0, 100, 100)
    (low, high), _ = paired_intervals(Samples(tuple(base + rng.normal(1, 0.1, 100))), Samples(tuple(base)))
    assert 0.9 < low < high < 1.1


def test_ratio_interval_of_a_uniform_scaling_is_near_that_scale_and_no_point():
    base = tuple(np.random.default_rng(3).uniform(1, 5, 50))
    _, (low, high) = paired_intervals(Samples(tuple(1.5 * x for x in base)), Samples(base))
    # Of 50 alike at most 1 - 0.05^(1/50) = 5.8 % are otherwise, each by the root of twice the variance.
    half = (1 - 0.05 ** (1 / 50)) * math.sqrt(2) * 1.5 * np.std(base, ddof=1) / np.mean(base)
    assert (low, high) == pytest.approx((1.5 - half, 1.5 + half))


def test_no_ratio_interval_where_the_base_may_be_zero():
    base = (0.0, 1.0, 2.0, 3.0)
    interval, ratio = paired_intervals(Samples((1.0, 2.0, 2.5, 4.0)), Samples(base))
    assert interval is not None
    assert ratio is None


def coverage(draw, truth, runs=400):
    """The share of simulated runs whose interval of the difference holds the truth."""
    rng = np.random.default_rng(4)
    hits = 0
    for _ in range(runs):
        (low, high), _ = paired_intervals(*draw(rng))
        hits += low <= truth <= high
    return hits / runs


def test_the_interval_of_a_mean_covers_the_truth_as_often_as_it_says():
    def draw(rng):
        base = rng.normal(0, 2, 30)
        return Samples(tuple(base + rng.normal(0.3, 1, 30))), Samples(tuple(base))

    assert 0.90 <= coverage(draw, 0.3) <= 0.98


def test_the_interval_of_a_mean_of_skewed_differences_covers_the_truth():
    def draw(rng):
        base = rng.normal(0, 2, 30)
        return Samples(tuple(base + rng.exponential(1, 30))), Samples(tuple(base))

    assert 0.88 <= coverage(draw, 1.0) <= 0.98


def test_the_interval_of_a_median_covers_the_truth():
    def draw(rng):
        a, b = rng.normal(3, 1, 31), rng.normal(1, 1, 31)
        return Samples(tuple(a), statistic="quantile"), Samples(tuple(b), statistic="quantile")

    assert 0.88 <= coverage(draw, 2.0) <= 0.99


def test_the_interval_of_shares_covers_the_truth():
    def draw(rng):
        kinds = rng.choice(4, 40, p=[0.1, 0.2, 0.5, 0.2])  # gained, lost, both right, both wrong
        a, b = np.isin(kinds, (0, 2)), np.isin(kinds, (1, 2))
        # The one pair in which nothing changed would be answered with "the same" and not an interval.
        a[0], b[0] = True, False
        return Samples(tuple(map(float, a))), Samples(tuple(map(float, b)))

    truth = (1 + 39 * (0.1 - 0.2)) / 40
    assert 0.92 <= coverage(draw, truth) <= 1.0


def test_paired_proportions_equal_agresti_and_min_by_hand():
    # 9 gained, 3 lost, 40 pairs; half a pair more in each of four cells: 9.5 - 3.5 of 42.
    low, high = shares_interval(*shares(9, 3, 20, 8))
    middle = 6 / 42
    margin = 1.959964 * math.sqrt(13 - 36 / 42) / 42
    assert (low, high) == pytest.approx((middle - margin, middle + margin), abs=1e-6)
    assert (low, high) == pytest.approx((-0.0197, 0.3054), abs=5e-4)


@quickly
@given(st.integers(0, 30), st.integers(0, 30), st.integers(0, 30), st.integers(1, 30))
def test_paired_proportions_turn_round_when_the_stages_are_swapped(gained, lost, both, neither):
    a, b = shares(gained, lost, both, neither)
    low, high = shares_interval(a, b)
    assert shares_interval(b, a) == pytest.approx((-high, -low))
    assert low <= (gained - lost) / (len(a) + 2) <= high


@quickly
@given(st.lists(st.tuples(scores, scores), min_size=2, max_size=12))
def test_intervals_turn_round_when_the_stages_are_swapped(pairs):
    a, b = (Samples(tuple(2 + x for x in side)) for side in zip(*pairs, strict=True))
    found, turned = paired_intervals(a, b)[0], paired_intervals(b, a)[0]
    assert (found is None) == (turned is None)
    if found:
        assert turned == pytest.approx((-found[1], -found[0]), abs=1e-6)


@quickly
@given(st.lists(scores, min_size=1, max_size=20), st.sampled_from(["mean", "exp", "quantile"]))
def test_identical_samples_are_the_same_from_8_on_and_certain_only_if_they_are_losses(values, statistic):
    same = Samples((*values, 0.5), statistic=statistic)
    found = compare(measured(0.5, samples=same), measured(0.5, samples=same))
    assert found.verdict == ("same" if len(same.values) >= 8 else "undecided")
    if statistic == "exp" and len(same.values) >= 8:
        assert (found.ci95, found.ratio_ci95) == ((0.0, 0.0), (1.0, 1.0))
    elif found.ci95:
        low, high = found.ci95
        assert low == -high < 0


def test_one_pair_decides_nothing():
    a, b = Samples((3.0,)), Samples((1.0,))
    assert paired_intervals(a, b) == (None, None)
    assert compare(measured(3.0, samples=a), measured(1.0, samples=b)).verdict == "undecided"


def test_three_lost_of_sixty_and_none_gained_is_undecided():
    a, b = shares(0, 3, 40, 17)
    stage = measured(40 / 60, "higher", 0.06, Samples(a))
    base = measured(43 / 60, "higher", 0.06, Samples(b))
    comparison = compare(stage, base)
    assert comparison.ci95[0] < 0 < comparison.ci95[1]
    assert comparison.verdict == "undecided"
    assert comparison.ratio_ci95[0] < 1 < comparison.ratio_ci95[1]


def test_the_same_answers_to_every_question_leave_room_for_others_to_differ():
    answers = Samples((1.0,) * 30 + (0.0,) * 20)
    found = compare(measured(0.6, "higher", 0.07, answers), measured(0.6, "higher", 0.07, answers))
    assert found.verdict == "same"
    bound = stats.binomtest(0, 50, alternative="less").proportion_ci(0.95, method="exact").high
    assert found.ci95 == pytest.approx((-bound, bound), abs=1e-9)
    assert bound > 1.959964 / 52, "(0.5 + 0.5)^½ of 52, by Agresti & Min"
    assert found.p == 1.0


def test_twelve_lost_of_sixty_and_none_gained_is_worse():
    a, b = shares(0, 12, 40, 8)
    stage, base = (measured(sum(x) / 60, "higher", 0.06, Samples(x)) for x in (a, b))
    assert compare(stage, base).verdict == "worse"


def test_a_weighted_mean_to_the_power_of_e_is_the_perplexity():
    sums, tokens = (30.0, 2.5, 100.0), (10.0, 5.0, 20.0)
    perplexity = Samples(sums, tokens, "exp")
    assert figure(perplexity)[0] == pytest.approx(math.exp(sum(sums) / sum(tokens)))


def test_each_resample_of_a_perplexity_weighs_the_windows_it_drew():
    sums, tokens = np.array([30.0, 2.5, 100.0]), np.array([10.0, 5.0, 20.0])
    rows = np.array([[0, 0, 2], [1, 1, 1]])
    expected = np.exp(sums[rows].sum(1) / tokens[rows].sum(1))
    assert figure(Samples(tuple(sums), tuple(tokens), "exp"), rows) == pytest.approx(expected)


def test_the_interval_of_two_perplexities_holds_the_figure_of_all_windows():
    rng = np.random.default_rng(5)
    base, tokens = rng.uniform(1, 3, 40), rng.integers(5, 50, 40).astype(float)
    a, b = (Samples(tuple(x * tokens), tuple(tokens), "exp") for x in (base + rng.normal(0.1, 0.05, 40), base))
    interval, ratio = paired_intervals(a, b)
    assert interval[0] < figure(a)[0] - figure(b)[0] < interval[1]
    assert ratio[0] < figure(a)[0] / figure(b)[0] < ratio[1]
    assert ratio[0] > 1


def test_figure_of_a_quantile_is_that_of_numpy():
    values = (4.0, 1.0, 9.0, 2.0)
    assert figure(Samples(values, statistic="quantile", quantile=0.9))[0] == np.quantile(values, 0.9)


@quickly
@given(st.lists(scores, min_size=2, max_size=30), st.floats(0.1, 10))
def test_with_equal_weights_the_standard_error_is_the_ordinary_one(values, weight):
    mean, stderr = ratio_stderr([weight * v for v in values], [weight] * len(values))
    assert mean == pytest.approx(np.mean(values), abs=1e-9)
    assert stderr == pytest.approx(np.std(values, ddof=1) / math.sqrt(len(values)), abs=1e-9)
    assert ratio_stderr(values) == pytest.approx((mean, stderr), abs=1e-9)


def test_the_weighted_standard_error_is_the_spread_of_the_weighted_mean():
    rng = np.random.default_rng(6)
    values, weights = rng.normal(0, 1, (4000, 50)), rng.uniform(1, 5, (4000, 50))
    means = (values * weights).sum(1) / weights.sum(1)
    estimates = [ratio_stderr(v * w, w)[1] for v, w in zip(values[:200], weights[:200], strict=True)]
    assert np.mean(estimates) == pytest.approx(means.std(), rel=0.06)


def test_one_sample_has_no_standard_error():
    assert ratio_stderr([6.0], [3.0]) == (2.0, None)


def test_the_standard_error_of_a_median_of_normal_samples_is_that_of_theory():
    # That of one data set is rough, so the mean of sixty is asked for.
    sets = np.random.default_rng(7).normal(10, 1, (60, 101))
    medians, stderrs = zip(*map(quantile_stderr, sets), strict=True)
    assert medians == tuple(np.median(sets, axis=1))
    assert np.mean(stderrs) == pytest.approx(math.sqrt(math.pi / 2 / 101), rel=0.15)


@pytest.mark.parametrize(
    "other",
    [Samples((1.0, 2.0)), Samples((1.0, 2.0, 3.0), statistic="exp"), Samples((1.0, 2.0, 3.0), quantile=0.9)],
)
def test_samples_of_other_questions_do_not_pair(other):
    with pytest.raises(ValueError, match="do not pair"):
        paired_intervals(Samples((1.0, 2.0, 3.0)), other)


@pytest.mark.parametrize(
    ("stage", "base", "better", "expected"),
    [
        (50, 100, "lower", "better"),
        (100, 50, "lower", "worse"),
        (50, 100, "higher", "worse"),
        (100, 50, "higher", "better"),
        (50, 50, "lower", "same"),
    ],
)
def test_exact_figures_are_judged_by_their_direction(stage, base, better, expected):
    comparison = compare(measured(stage, better), measured(base, better))
    assert comparison.verdict == expected
    assert comparison.ci95 == (stage - base, stage - base)
    assert comparison.ratio_ci95 == (stage / base, stage / base)


def test_an_exact_figure_against_nothing_has_no_ratio():
    comparison = compare(measured(5), measured(0))
    assert (comparison.ratio, comparison.ratio_ci95, comparison.verdict) == (None, None, "worse")


def test_an_uncertain_figure_without_samples_decides_nothing():
    comparison = compare(measured(1.0, stderr=0.1), measured(9.0, stderr=0.1))
    assert comparison.ci95 is None
    assert comparison.verdict == "undecided"


def test_an_interval_that_touches_nought_decides_nothing():
    assert verdict((0.0, 1.0), "higher") == verdict((-1.0, 0.0), "lower") == verdict((-1.0, 1.0), "lower")
    assert verdict((0.0, 1.0), "higher") == "undecided"


def test_the_same_seed_gives_the_same_interval():
    rng = np.random.default_rng(8)
    a, b = (Samples(tuple(rng.normal(2, 1, 20))) for _ in range(2))
    assert paired_intervals(a, b, seed=3) == paired_intervals(a, b, seed=3)
    assert paired_intervals(a, b, seed=3) != paired_intervals(a, b, seed=4)


def test_resamples_are_the_same_in_any_chunks(monkeypatch):
    values = np.random.default_rng(1).exponential(size=51)
    whole = quantile_spread(lambda rows: np.median(values[rows], axis=1), 51, 0)
    seen = []

    def median(rows):
        seen.append(len(rows))
        return np.median(values[rows], axis=1)

    monkeypatch.setattr("llmq.statistics.resampling.CHUNK", 51 * 300)
    assert quantile_spread(median, 51, 0) == whole
    assert seen == [300, 300, 300, 100]


def test_neighbours_are_no_independent_samples():
    rng = np.random.default_rng(0)
    held, naive = [], []
    for _ in range(200):
        slow = 10 + np.convolve(rng.normal(size=103), np.ones(8) / 8, "valid")  # 96 values, the mean of 8 each
        figure = mean("t", "m", slow.tolist(), "", "higher", "", clusters=stretches(96))
        found = alone(figure.samples)
        assert (figure.n, found.n) == (96, 8)
        assert found.stderr == pytest.approx(figure.stderr)
        held.append(found.low < 10 < found.high)
        naive.append(abs(figure.value - 10) < 2 * ratio_stderr(slow.tolist())[1])
    assert np.mean(held) > 0.93
    assert np.mean(naive) < 0.7


def test_stretches_are_as_long_as_the_next():
    assert stretches(1) == (0,)
    assert stretches(5) == (0, 1, 2, 3, 4)
    assert np.bincount(stretches(20)).tolist() == [3, 2, 3, 2, 3, 2, 3, 2]
    assert [max(stretches(n)) + 1 for n in (96, 160, 320, 5000)] == [8, 10, 20, 20]


def test_the_spread_of_whole_clusters_covers_what_visits_to_a_drifting_machine_scatter():
    rng, hits = np.random.default_rng(3), 0
    visits = tuple(i for i in range(8) for _ in range(2 + i % 2))
    for trial in range(120):
        drift = rng.normal(0, 0.1, 8)
        v = np.array([drift[visit] for visit in visits]) + rng.normal(0, 0.01, len(visits))
        stderr = cluster_spread(lambda rows, v=v: np.median(v[rows], axis=1), visits, trial, resamples=150)
        hits += abs(np.median(v)) < t_quantile(0.975, 7) * stderr
    assert 0.89 < hits / 120 <= 1

"""What a sample could have seen, exact tests and corrections, against closed forms and other libraries."""

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from llmq.statistics import compare as statistics
from llmq.statistics import power, proportions
from llmq.statistics.estimates import alone, difference, ratio
from llmq.statistics.proportions import Table
from llmq.types import Measurement, Samples

quickly = settings(max_examples=60, deadline=None, database=None)
p_values = st.lists(st.floats(0, 1), min_size=1, max_size=12)


def test_the_reach_of_a_test_is_the_textbook_one():
    assert abs(power.REACH - (1.959964 + 0.841621)) < 1e-5
    assert power.needed(0.5, 100, 0.5) == math.ceil(100 * 2.801585**2)
    assert power.needed(0.5, 100, 0.0) is None


def test_a_difference_of_the_detectable_size_is_seen_in_four_of_five_runs():
    rng = np.random.default_rng(0)
    true = power.detectable(1 / math.sqrt(100))
    seen = 0
    for _ in range(400):
        base = rng.normal(0, 3, 100)
        found = difference(Samples(tuple(base + rng.normal(true, 1, 100))), Samples(tuple(base)))
        seen += found.low > 0
    assert 0.73 <= seen / 400 <= 0.86


@quickly
@given(st.floats(0.01, 10), st.integers(2, 1000), st.floats(0.01, 10))
def test_as_many_as_are_needed_make_the_margin_detectable(stderr, n, margin):
    enough = power.needed(stderr, n, margin)
    assert power.detectable(stderr * math.sqrt(n / enough)) <= margin * (1 + 1e-9)


def test_holm_by_hand():
    # 0.01 × 4, 0.02 × 3, then 0.03 × 2 and 0.04 × 1 that may not be less than what stands before.
    assert power.holm([0.03, 0.01, 0.04, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert power.holm([]) == []


@quickly
@given(p_values)
def test_holm_is_between_no_correction_and_that_of_bonferroni(values):
    for p, corrected in zip(values, power.holm(values), strict=True):
        assert p <= corrected <= min(1.0, len(values) * p) + 1e-12


@pytest.mark.slow
def test_one_false_alarm_in_twenty_tables_and_not_in_two_rows():
    """Ten figures of two stages that truly do not differ."""
    rng = np.random.default_rng(1)
    alarms = {"alone": 0, "together": 0}
    for _ in range(150):
        found = []
        for _ in range(10):
            a, b = (Samples(tuple(rng.normal(5, 1, 30))) for _ in range(2))
            figures = (Measurement("t", "m", float(np.mean(s.values)), "", "higher", 30, 0.1, "", s) for s in (a, b))
            found.append(statistics.compare(*figures))
        for name, table in (("alone", found), ("together", statistics.corrected(found))):
            alarms[name] += any(c.verdict in ("better", "worse") for c in table)
    assert alarms["alone"] / 150 > 0.25
    assert alarms["together"] / 150 <= 0.10


def test_exact_figures_are_no_part_of_the_correction():
    size, other = (Measurement("size", "bytes", v, "", "lower", 1, 0.0, "", exact=True) for v in (1.0, 2.0))
    found = statistics.corrected([statistics.compare(size, other)] * 50)
    assert {(c.verdict, c.p_holm) for c in found} == {("better", None)}


@quickly
@given(st.integers(0, 60), st.integers(0, 60))
def test_mcnemar_is_scipys_binomial_test_of_what_changed(gained, lost):
    p = proportions.mcnemar(Table(5, gained, lost, 5))
    assert p == pytest.approx(stats.binomtest(gained, gained + lost).pvalue if gained + lost else 1.0)


def test_mcnemar_of_very_many_goes_on_where_the_exact_one_ends():
    below, above = (proportions.mcnemar(Table(0, n + 40, n - 40, 0)) for n in (500, 501))
    assert above == pytest.approx(below, rel=0.05)


@quickly
@given(st.integers(0, 50), st.integers(1, 50))
def test_wilson_is_scipys(right, more):
    n = max(right, 1) + more
    expected = stats.binomtest(right, n).proportion_ci(method="wilson")
    assert proportions.wilson(right, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_the_ratio_of_shares_equals_bonett_and_price_by_hand():
    # 43 both, 5 gained, 12 lost, 10 neither: n* = 60, of which the first has 48 and the second 55 right.
    stderr, (low, high) = proportions.ratio(Table(43, 5, 12, 10))
    assert stderr == pytest.approx(math.sqrt(19 / (49 * 56)))
    spread = [math.sqrt((1 - (k + 1) / 62) / (k + 1)) for k in (48, 55)]
    z = 1.959964 * stderr / sum(spread)
    ends = []
    for k in (48, 55):
        middle, half = (k + z * z / 2) / (60 + z * z), z / (60 + z * z) * math.sqrt(k * (60 - k) / 60 + z * z / 4)
        ends.append((middle - half, middle + half))
    assert (low, high) == pytest.approx((ends[0][0] / ends[1][1], ends[0][1] / ends[1][0]))
    assert low < 48 / 55 < high


@quickly
@given(st.integers(1, 30), st.integers(0, 30), st.integers(0, 30), st.integers(0, 30))
def test_the_ratio_of_shares_turns_over_when_the_stages_are_swapped(both, gained, lost, neither):
    low, high = proportions.ratio(Table(both, gained, lost, neither))[1]
    assert proportions.ratio(Table(both, lost, gained, neither))[1] == pytest.approx((1 / high, 1 / low))


def test_the_p_of_a_difference_is_that_of_scipys_t_test_for_normal_samples():
    rng = np.random.default_rng(2)
    base = rng.normal(0, 3, 60)
    stage = base + rng.normal(0.25, 1, 60)
    found = difference(Samples(tuple(stage)), Samples(tuple(base)))
    assert found.p == pytest.approx(stats.ttest_rel(stage, base).pvalue, abs=0.012)
    assert found.stderr == pytest.approx(stats.sem(stage - base))


@quickly
@given(st.integers(0, 10_000))
def test_an_interval_without_0_and_a_small_p_are_one_thing(seed):
    rng = np.random.default_rng(seed)
    base = rng.normal(0, 1, 25)
    found = difference(Samples(tuple(base + rng.exponential(1, 25) - 0.6)), Samples(tuple(base)))
    if abs(found.p - 0.05) > 0.002:  # quantiles are read between two resamples
        assert (found.p < 0.05) == (not found.low <= 0 <= found.high)


def test_the_interval_of_a_perplexity_alone_is_that_of_its_log():
    rng = np.random.default_rng(3)
    tokens = rng.integers(50, 100, 80).astype(float)
    sums = rng.normal(2, 0.3, 80) * tokens
    found = alone(Samples(tuple(sums), tuple(tokens), "exp"))
    log_mean = alone(Samples(tuple(sums), tuple(tokens)))
    assert found.interval == pytest.approx((math.exp(log_mean.low), math.exp(log_mean.high)))
    assert found.value == pytest.approx(math.exp(sums.sum() / tokens.sum()))


def test_nothing_is_known_of_a_tail_that_no_sample_lies_in():
    times = Samples(tuple(np.random.default_rng(4).uniform(1, 2, 12)), statistic="quantile", quantile=0.95)
    assert ratio(times, Samples(times.values[::-1], statistic="quantile", quantile=0.95)) is None


@pytest.mark.slow  # a timing, which a busy machine may fail
def test_a_report_of_a_hundred_comparisons_takes_seconds():
    rng = np.random.default_rng(5)
    tokens = tuple(rng.integers(100, 500, 2000).astype(float))
    sides = [Samples(tuple(rng.normal(2, 1, 2000) * tokens), tokens, "exp") for _ in range(101)]
    figures = [Measurement("t", "m", 1.0, "", "lower", 2000, 0.1, "", s) for s in sides]
    began = time.process_time()
    statistics.corrected([statistics.compare(m, figures[0]) for m in figures[1:]])
    assert time.process_time() - began < 20

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binomtest
from scipy.stats import bootstrap as scipy_bootstrap

from so8t_eval.intervals import Interval, bootstrap, format_interval, wilson


def mean_of(values):
    return lambda index: values[index].mean(axis=1)


@settings(deadline=None, max_examples=60)
@given(st.data(), st.integers(1, 800), st.floats(0.5, 0.999))
def test_wilson_equals_scipy(data, n, confidence):
    successes = data.draw(st.integers(0, n))
    ours = wilson(successes, n, confidence)
    theirs = binomtest(successes, n).proportion_ci(confidence, method="wilson")
    assert ours.value == successes / n
    assert ours.n == n
    assert ours.low == pytest.approx(theirs.low, abs=1e-9)
    assert ours.high == pytest.approx(theirs.high, abs=1e-9)
    assert 0 <= ours.low <= ours.value <= ours.high <= 1


def test_wilson_without_trials_is_undefined_not_zero():
    assert wilson(0, 0) == Interval(None, None, None, 0)


def test_wilson_ends_are_exact():
    assert wilson(0, 9).low == 0.0
    assert wilson(9, 9).high == 1.0


@pytest.mark.parametrize(("successes", "n"), [(-1, 3), (4, 3)])
def test_wilson_rejects_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="expected 0 <= successes <= n"):
        wilson(successes, n)


@pytest.mark.parametrize("confidence", [0.0, 1.0, 95.0])
def test_confidence_must_be_a_share(confidence):
    with pytest.raises(ValueError, match="between 0 and 1"):
        wilson(1, 2, confidence)


def test_wilson_covers_the_true_rate_about_as_often_as_it_says():
    rng = np.random.default_rng(1)
    counts = rng.binomial(50, 0.9, size=3000)
    covered = [wilson(int(k), 50).low <= 0.9 <= wilson(int(k), 50).high for k in counts]
    assert 0.92 < np.mean(covered) < 0.98


def test_bootstrap_is_close_to_scipy():
    values = np.random.default_rng(0).random(150)
    ours = bootstrap(mean_of(values), values.size, np.random.default_rng(1), 4000).interval
    theirs = scipy_bootstrap(
        (values,),
        np.mean,
        n_resamples=4000,
        method="percentile",
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ours.value == pytest.approx(values.mean())
    assert ours.low == pytest.approx(theirs.low, abs=0.006)
    assert ours.high == pytest.approx(theirs.high, abs=0.006)


def test_basic_bootstrap_mirrors_percentile_around_the_value():
    values = np.random.default_rng(0).beta(1, 6, 80)
    percentile = bootstrap(mean_of(values), 80, np.random.default_rng(3)).interval
    basic = bootstrap(mean_of(values), 80, np.random.default_rng(3), method="basic").interval
    assert basic.low == pytest.approx(2 * basic.value - percentile.high)
    assert basic.high == pytest.approx(2 * basic.value - percentile.low)


def test_same_seed_same_interval_and_other_seed_other_interval():
    values = np.random.default_rng(0).random(40)
    first, again, other = (
        bootstrap(mean_of(values), 40, np.random.default_rng(seed)) for seed in (5, 5, 6)
    )
    assert first == again
    assert first != other


def test_chunked_resampling_visits_every_resample():
    n_items, seen = 700_000, []

    def statistic(index):
        seen.append(index.shape)
        return index[:, :7].mean(axis=1) / n_items

    bootstrap(statistic, n_items, np.random.default_rng(0), n_resamples=7)
    assert seen[0] == (1, n_items)
    assert sum(rows for rows, _ in seen[1:]) == 7
    assert len(seen) > 2


@pytest.mark.parametrize("method", ["percentile", "basic"])
def test_bounds_enclose_the_value_even_when_all_resamples_are_larger(method):
    def biased(index):
        is_sample = (index == np.arange(10)).all(axis=1)
        return np.where(is_sample, 0.1, 0.5 + index[:, 0] / 100)

    low, high = bootstrap(biased, 10, np.random.default_rng(0), method=method).interval[1:3]
    assert 0 <= low <= 0.1 <= high <= 1


def undefined_when_first_is_below(limit):
    return lambda index: np.where(
        (index[:, 0] < limit) & (index[:, 0] != 0) | (index[:, 0] == 1), np.nan, index[:, 0] / 100
    )


def test_undefined_resamples_are_skipped_and_their_share_is_stated():
    result = bootstrap(undefined_when_first_is_below(4), 100, np.random.default_rng(0))
    assert result.undefined_share == pytest.approx(0.03, abs=0.015)
    assert result.interval.low is not None


def test_no_bounds_when_undefined_resamples_outweigh_the_tails():
    result = bootstrap(undefined_when_first_is_below(40), 100, np.random.default_rng(0))
    assert result.undefined_share == pytest.approx(0.39, abs=0.05)
    assert result.interval == Interval(0.0, None, None, 100)


def test_undefined_value_is_none_with_all_resamples_undefined():
    result = bootstrap(lambda index: np.full(len(index), np.nan), 5, np.random.default_rng(0))
    assert result == (Interval(None, None, None, 5), 1.0)


def test_no_items_is_undefined():
    values = np.array([])
    assert bootstrap(mean_of(values), 0, np.random.default_rng(0)).interval == Interval(
        None, None, None, 0
    )


def test_one_item_has_a_value_but_no_bounds():
    values = np.array([0.25])
    result = bootstrap(mean_of(values), 1, np.random.default_rng(0))
    assert result.interval == Interval(0.25, None, None, 1)


def test_bootstrap_of_600_cases_is_quick():
    values = np.random.default_rng(0).random(600)
    start = time.process_time()
    bootstrap(mean_of(values), 600, np.random.default_rng(0), 2000)
    assert time.process_time() - start < 1


@pytest.mark.parametrize(
    ("interval", "text"),
    [
        (Interval(0.94, 0.88, 0.97, 50), "0.94 [0.88, 0.97] n=50"),
        (Interval(None, None, None, 0), "undefined (n=0)"),
        (Interval(1.0, None, None, 1), "1.00 [no interval] n=1"),
        (Interval(1 / 600, 0.0003, 0.0094, 600), "<0.01 [<0.01, 0.01] n=600"),
        (Interval(0.999, 0.98, 1.0, 999), ">0.99 [0.98, 1.00] n=999"),
    ],
)
def test_format_never_rounds_an_event_away(interval, text):
    assert format_interval(interval) == text

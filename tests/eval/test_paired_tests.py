import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from so8t_eval.paired_tests import (
    Discordant,
    discordant_pairs,
    holm,
    mid_p_mcnemar,
    minimum_detectable_difference,
    minimum_detectable_shift,
    paired_bootstrap,
    paired_proportions,
    tango_interval,
)

counts = st.integers(0, 60)


@given(counts, counts)
def test_mid_p_is_the_exact_p_less_the_probability_of_the_counts(gained, lost):
    n = gained + lost
    if n == 0:
        assert mid_p_mcnemar(Discordant(0, 0)) == 1.0
        return
    exact = binomtest(gained, n, 0.5).pvalue
    point = math.comb(n, gained) * 0.5**n
    expected = exact - (point / 2 if gained == lost else point)
    assert mid_p_mcnemar(Discordant(gained, lost)) == pytest.approx(expected, abs=1e-12)


def test_mid_p_of_many_pairs_is_exact_and_quick():
    exact = binomtest(20_000, 40_400, 0.5).pvalue - binom.pmf(20_000, 40_400, 0.5)
    assert mid_p_mcnemar(Discordant(20_000, 20_400)) == pytest.approx(exact, rel=1e-6)


@given(counts, counts)
def test_mid_p_is_symmetric_and_a_probability(gained, lost):
    p = mid_p_mcnemar(Discordant(gained, lost))
    assert 0 < p <= 1
    assert p == mid_p_mcnemar(Discordant(lost, gained))


def test_published_example():
    # Fagerland, Lydersen and Laake: airway hyper-responsiveness, 21 pairs, 1 and 7 discordant.
    assert mid_p_mcnemar(Discordant(1, 7)) == pytest.approx(0.039, abs=5e-4)
    low, high = tango_interval(Discordant(1, 7), 21)
    assert (low, high) == (pytest.approx(-0.517, abs=5e-4), pytest.approx(-0.026, abs=5e-4))


@settings(deadline=None)
@given(counts, counts, st.integers(0, 100))
def test_tango_interval_holds_the_difference_and_mirrors(gained, lost, same):
    n = gained + lost + same
    if n == 0:
        return
    low, high = tango_interval(Discordant(gained, lost), n)
    assert -1 <= low <= (gained - lost) / n <= high <= 1
    mirrored = tango_interval(Discordant(lost, gained), n)
    assert mirrored == (pytest.approx(-high, abs=1e-9), pytest.approx(-low, abs=1e-9))


@pytest.mark.parametrize("n", [1, 12, 200, 5000])
def test_without_discordant_pairs_the_interval_does_not_collapse(n):
    z2 = 1.959964**2
    assert tango_interval(Discordant(0, 0), n)[1] == pytest.approx(z2 / (n + z2), rel=1e-5)


@pytest.mark.parametrize(("pairs", "n"), [(Discordant(0, 0), 0), (Discordant(3, 2), 4)])
def test_impossible_counts_are_refused(pairs, n):
    with pytest.raises(ValueError, match="pairs"):
        tango_interval(pairs, n)


def test_tango_interval_covers_the_true_difference():
    rng = np.random.default_rng(0)
    n, gained, lost = 100, 0.08, 0.03
    draws = rng.multinomial(n, [gained, lost, 1 - gained - lost], size=1500)
    covered = 0
    for b, c, _ in draws:
        low, high = tango_interval(Discordant(int(b), int(c)), n)
        covered += low <= gained - lost <= high
    assert covered / len(draws) == pytest.approx(0.95, abs=0.02)


def test_paired_proportions_count_pairs_by_direction():
    first, second = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 1, 1, 1])
    assert discordant_pairs(first, second) == (2, 1)
    result = paired_proportions(first, second)
    assert result.difference == pytest.approx(0.2)
    assert result.p_value == mid_p_mcnemar(Discordant(2, 1))
    assert paired_proportions(first[:0], second[:0]).difference is None


def mean_of(values):
    return lambda weights: weights @ values / weights.sum(axis=1)


def test_bootstrap_covers_the_true_difference_and_is_seeded():
    covered = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        shared = rng.normal(size=80)
        first = shared + rng.normal(0, 0.5, 80)
        second = shared + rng.normal(0.2, 0.5, 80)
        result = paired_bootstrap(
            mean_of(first), mean_of(second), 80, np.random.default_rng(1), n_resamples=400
        )
        covered += result.low <= 0.2 <= result.high
    assert 0.9 <= covered / 200 <= 0.985
    again = paired_bootstrap(
        mean_of(first), mean_of(second), 80, np.random.default_rng(1), n_resamples=400
    )
    assert again == result


def test_pairing_makes_the_bootstrap_of_correlated_runs_sharp():
    rng = np.random.default_rng(0)
    shared = rng.normal(0, 5, 100)
    result = paired_bootstrap(
        mean_of(shared), mean_of(shared + rng.normal(0.3, 0.5, 100)), 100, rng, n_resamples=500
    )
    assert result.high - result.low < 0.5
    assert result.p_value < 0.01


def test_bootstrap_without_spread_or_definition_bounds_nothing():
    values = np.arange(10.0)
    rng = np.random.default_rng(0)
    same = paired_bootstrap(mean_of(values), mean_of(values), 10, rng, n_resamples=50)
    assert same == (0.0, None, None, None, None)

    def often_undefined(weights):
        return np.where(weights[:, 0] > 0, 1.0, np.nan)

    rare = paired_bootstrap(mean_of(values), often_undefined, 10, rng, n_resamples=200)
    assert rare.difference == pytest.approx(1 - values.mean())
    assert rare[1:] == (None, None, None, None)
    assert paired_bootstrap(mean_of(values), mean_of(values), 0, rng).difference is None


def test_holm_by_hand():
    # Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1, each at least the one before.
    assert holm([0.01, 0.04, None, 0.03, 0.005]) == pytest.approx([0.03, 0.06, None, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.none() | st.floats(0, 1), max_size=12))
def test_holm_never_lowers_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    pairs = [(p, q) for p, q in zip(p_values, adjusted, strict=True) if p is not None]
    assert all(p <= q <= 1 for p, q in pairs)
    assert [q for _, q in sorted(pairs)] == sorted(q for _, q in pairs)
    assert [q is None for q in adjusted] == [p is None for p in p_values]


@settings(deadline=None)
@given(st.integers(20, 5000), st.floats(0, 0.5))
def test_minimum_detectable_difference_solves_its_formula(n, share):
    delta = minimum_detectable_difference(n, share)
    psi = max(share, delta)
    needed = ((1.959964 * psi**0.5 + 0.841621 * (psi - delta**2) ** 0.5) / delta) ** 2
    assert needed == pytest.approx(n, rel=1e-3)


def test_minimum_detectable_difference_is_found_about_four_times_in_five():
    n, share = 400, 0.1
    delta = minimum_detectable_difference(n, share)
    rng = np.random.default_rng(0)
    gained, lost = (share + delta) / 2, (share - delta) / 2
    draws = rng.multinomial(n, [gained, lost, 1 - share], size=2000)
    found = np.mean([mid_p_mcnemar(Discordant(int(b), int(c))) < 0.05 for b, c, _ in draws])
    assert found == pytest.approx(0.8, abs=0.05)


def test_too_few_pairs_detect_nothing():
    assert minimum_detectable_difference(3, 0.0) is None
    assert minimum_detectable_difference(0, 0.0) is None
    assert minimum_detectable_shift(None) is None
    assert minimum_detectable_shift(0.1) == pytest.approx(0.28016, abs=1e-5)

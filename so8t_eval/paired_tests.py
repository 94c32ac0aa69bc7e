"""Tests on paired outcomes: mid-p McNemar, Tango's interval, paired bootstrap, Holm, power."""

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Float, Int

POWER: Final = 0.8
SIGNIFICANCE: Final = 0.05
_MOST_UNDEFINED: Final = 0.05
_CHUNK_WEIGHTS: Final = 1 << 21

WeightedStatistic = Callable[[Float[np.ndarray, "resamples items"]], Float[np.ndarray, "resamples"]]
"""Statistic of many resamples at once: how often each item was drawn in, one value per row out, NaN
where the statistic is undefined."""


class Discordant(NamedTuple):
    """Pairs in which one run only has the property: ``gained`` by the second, ``lost`` by it."""

    gained: int
    lost: int

    @property
    def n(self) -> int:
        """All discordant pairs."""
        return self.gained + self.lost


class PairedDifference(NamedTuple):
    """Second minus first, its bounds and two-sided p-value; None where undefined.

    ``standard_error`` is that of the difference.
    """

    difference: float | None
    low: float | None
    high: float | None
    p_value: float | None
    standard_error: float | None


def mid_p_mcnemar(discordant: Discordant) -> float:
    """Return the two-sided mid-p value of McNemar's test; 1 without discordant pairs.

    It is the exact binomial p-value less the probability of the counts seen, or less half of it
    where both directions are equally frequent.

    Source: Fagerland, Lydersen and Laake 2013, The McNemar test for binary matched-pairs data,
        BMC Medical Research Methodology 13:91.
    """
    n, fewer = discordant.n, min(discordant)
    if n == 0:
        return 1.0
    ways, ways_below = 1, 0  # binomial coefficients as integers: exact at any count
    for i in range(fewer):
        ways_below += ways
        ways = ways * (n - i) // (i + 1)
    if discordant.gained == discordant.lost:
        return 1 - ways / (1 << (n + 1))
    return (2 * ways_below + ways) / (1 << n)


def tango_interval(
    discordant: Discordant, n_pairs: int, confidence: float = 0.95
) -> tuple[float, float]:
    """Return the score interval of the difference of two paired proportions.

    Unlike Wald's it does not collapse without discordant pairs: it is then ± z² / (n + z²).

    Raises:
        ValueError: there are no pairs, or fewer than discordant ones.

    Source: Tango 1998, Equivalence test and confidence interval for the difference in proportions
        for the paired-sample design, Statistics in Medicine 17:891-908.
    """
    if not discordant.n <= n_pairs or n_pairs == 0:
        raise ValueError(f"expected at least {max(1, discordant.n)} pairs, found {n_pairs}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    estimate = (discordant.gained - discordant.lost) / n_pairs

    low = _crossing(lambda delta: _tango_score(discordant, n_pairs, delta) - z, -1.0, estimate)
    high = _crossing(lambda delta: _tango_score(discordant, n_pairs, delta) + z, estimate, 1.0)
    return low, high


def paired_proportions(
    first: Int[np.ndarray, " pairs"], second: Int[np.ndarray, " pairs"], confidence: float = 0.95
) -> PairedDifference:
    """Compare the shares of ones among the same cases: mid-p McNemar and Tango's interval."""
    n = first.size
    if n == 0:
        return PairedDifference(None, None, None, None, None)
    pairs = discordant_pairs(first, second)
    difference = (pairs.gained - pairs.lost) / n
    low, high = tango_interval(pairs, n, confidence)
    error = math.sqrt(max(0.0, pairs.n / n - difference**2) / n)
    return PairedDifference(difference, low, high, mid_p_mcnemar(pairs), error)


def discordant_pairs(
    first: Int[np.ndarray, " pairs"], second: Int[np.ndarray, " pairs"]
) -> Discordant:
    """Count the pairs of 0s and 1s that differ, by direction."""
    return Discordant(int(np.sum(second > first)), int(np.sum(second < first)))


def paired_bootstrap(
    first: WeightedStatistic,
    second: WeightedStatistic,
    n_items: int,
    rng: np.random.Generator,
    *,
    n_resamples: int = 2000,
    confidence: float = 0.95,
) -> PairedDifference:
    """Compare a statistic of two runs on the same cases, which are resampled together.

    Percentile bounds; the p-value is twice the smaller share of resampled differences beyond 0.
    Bounds and p-value are None when more than 5 % of the resamples are undefined, or when all
    agree: no difference was seen, which bounds nothing.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 and 15.
    """
    if n_items == 0:
        return PairedDifference(None, None, None, None, None)
    once = np.ones((1, n_items))
    value = float(second(once)[0] - first(once)[0])
    if math.isnan(value):
        return PairedDifference(None, None, None, None, None)
    rows = max(1, _CHUNK_WEIGHTS // n_items)
    chunks: list[np.ndarray] = []
    for done in range(0, n_resamples, rows):
        weights = _resampled_weights(min(rows, n_resamples - done), n_items, rng)
        chunks.append(second(weights) - first(weights))
    resampled = np.concatenate(chunks)
    defined = resampled[~np.isnan(resampled)]
    if defined.size < (1 - _MOST_UNDEFINED) * n_resamples or np.ptp(defined) == 0:
        return PairedDifference(value, None, None, None, None)
    tail = (1 - confidence) / 2
    low, high = (float(bound) for bound in np.quantile(defined, [tail, 1 - tail]))
    beyond = min(np.sum(defined <= 0), np.sum(defined >= 0))
    p_value = min(1.0, 2 * float(beyond + 1) / (defined.size + 1))
    error = float(defined.std(ddof=1))
    return PairedDifference(value, min(low, value), max(high, value), p_value, error)


def holm(p_values: Sequence[float | None]) -> list[float | None]:
    """Return p-values adjusted for their number by Holm's step-down method, None kept.

    Source: Holm 1979, A simple sequentially rejective multiple test procedure.
    """
    known = sorted((p, place) for place, p in enumerate(p_values) if p is not None)
    adjusted: list[float | None] = [None] * len(p_values)
    largest = 0.0
    for rank, (p, place) in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - rank) * p))
        adjusted[place] = largest
    return adjusted


def minimum_detectable_difference(n_pairs: int, discordant_share: float) -> float | None:
    """Return the smallest difference of paired proportions found with power 0.8 at p < 0.05.

    Solves n = (z_0.975 √ψ + z_0.8 √(ψ - δ²))² / δ² for δ, where ψ is the share of discordant pairs
    seen, or δ itself where that is larger (all discordant pairs in one direction). None when not
    even a difference of 1 would be found.

    Source: Miettinen 1968, The matched pairs design in the case of all-or-none responses,
        Biometrics 24:339-352; Connor 1987, Biometrics 43:207-211.
    """

    def missing_pairs(delta: float) -> float:
        psi = max(discordant_share, delta)
        spread = math.sqrt(max(0.0, psi - delta**2))
        return ((_z_sum()[0] * math.sqrt(psi) + _z_sum()[1] * spread) / delta) ** 2 - n_pairs

    if n_pairs == 0 or missing_pairs(1.0) > 0:
        return None
    return _crossing(missing_pairs, 0.0, 1.0)


def minimum_detectable_shift(standard_error: float | None) -> float | None:
    """Return (z_0.975 + z_0.8) standard errors: the shift found with power 0.8 at p < 0.05."""
    return None if standard_error is None else sum(_z_sum()) * standard_error


def _z_sum() -> tuple[float, float]:
    normal = NormalDist()
    return normal.inv_cdf(1 - SIGNIFICANCE / 2), normal.inv_cdf(POWER)


def _crossing(decreasing: Callable[[float], float], low: float, high: float) -> float:
    """Return where a decreasing function crosses 0 between ``low`` and ``high``, by bisection."""
    while low < (middle := (low + high) / 2) < high:
        if decreasing(middle) > 0:
            low = middle
        else:
            high = middle
    return middle


def _tango_score(discordant: Discordant, n: int, delta: float) -> float:
    gained, lost = discordant
    a = 2 * n
    b = -gained - lost + (2 * n - gained + lost) * delta
    c = -lost * delta * (1 - delta)
    share_lost = (math.sqrt(max(0.0, b * b - 4 * a * c)) - b) / (2 * a)
    variance = n * (2 * share_lost + delta * (1 - delta))
    distance = gained - lost - n * delta
    if variance <= 0:
        return 0.0 if distance == 0 else math.copysign(math.inf, distance)
    return distance / math.sqrt(variance)


def _resampled_weights(
    n_resamples: int, n_items: int, rng: np.random.Generator
) -> Float[np.ndarray, "resamples items"]:
    drawn = rng.integers(0, n_items, size=(n_resamples, n_items))
    drawn += n_items * np.arange(n_resamples)[:, None]
    counts = np.bincount(drawn.ravel(), minlength=n_resamples * n_items)
    return counts.reshape(n_resamples, n_items).astype(np.float64)

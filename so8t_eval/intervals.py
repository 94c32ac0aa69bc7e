"""Estimates with their intervals: Wilson for proportions, seeded bootstrap for the rest."""

import math
from collections.abc import Callable
from statistics import NormalDist
from typing import Final, Literal, NamedTuple

import numpy as np
from jaxtyping import Float, Int

IndexStatistic = Callable[[Int[np.ndarray, "resamples items"]], Float[np.ndarray, " resamples"]]
"""Statistic of many resamples at once: rows of item indices in, one value per row out, NaN where
the statistic is undefined."""

_CHUNK_INDICES: Final = 1 << 21
"""Indices drawn at a time: bounds the memory of a bootstrap at a few tens of megabytes."""


class Interval(NamedTuple):
    """An estimate with its confidence bounds. None means undefined, never 0.

    ``low`` and ``high`` are both None where the data cannot bound the value. ``n`` is the
    denominator: how many items the value rests on.
    """

    value: float | None
    low: float | None
    high: float | None
    n: int


class BootstrapResult(NamedTuple):
    """A bootstrap interval and the share of resamples, 0 to 1, on which it was undefined."""

    interval: Interval
    undefined_share: float


def wilson(successes: int, n: int, confidence: float = 0.95) -> Interval:
    """Return the proportion ``successes / n`` with its Wilson score interval.

    Without trials (``n`` = 0) value and bounds are None.

    Raises:
        ValueError: ``successes`` is not within 0..n or ``confidence`` not within (0, 1).

    Source: Wilson 1927, JASA 22:209-212, without continuity correction.
    """
    if not 0 <= successes <= n:
        raise ValueError(f"expected 0 <= successes <= n, found {successes} of {n}")
    z = _two_sided_z(confidence)
    if n == 0:
        return Interval(None, None, None, 0)
    share = successes / n
    shrink = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / shrink
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n)) / shrink
    low = 0.0 if successes == 0 else max(0.0, centre - half)
    high = 1.0 if successes == n else min(1.0, centre + half)
    return Interval(share, low, high, n)


def bootstrap(
    statistic: IndexStatistic,
    n_items: int,
    rng: np.random.Generator,
    n_resamples: int = 2000,
    *,
    confidence: float = 0.95,
    method: Literal["percentile", "basic"] = "percentile",
    bounds: tuple[float, float] = (0.0, 1.0),
) -> BootstrapResult:
    """Return a statistic of ``n_items`` items with its bootstrap interval.

    Resamples on which the statistic is undefined are skipped. The bounds are None where they would
    claim more than the data say: when the undefined share exceeds ``1 - confidence`` (the skipped
    resamples outweigh both tails), or when all resamples agree (no spread was observed, as with one
    case or a perfect score). Otherwise they enclose the value.

    Args:
        statistic: see ``IndexStatistic``; called with at most a few million indices at a time.
        n_items: number of items to resample.
        rng: source of the resamples; the same state gives the same interval.
        n_resamples: number of resamples.
        confidence: nominal coverage.
        method: ``percentile``, or ``basic`` (reverse percentile) for statistics whose resamples are
            biased in the same direction as the estimate itself, such as a calibration error.
        bounds: smallest and largest possible value; the interval is cut to them.

    Source: Efron and Tibshirani 1993, An Introduction to the Bootstrap, ch. 13 (percentile);
        Davison and Hinkley 1997, Bootstrap Methods and their Application, eq. 5.6 (basic).
    """
    _two_sided_z(confidence)
    value = float(statistic(np.arange(n_items)[None, :])[0]) if n_items else math.nan
    if math.isnan(value):
        return BootstrapResult(Interval(None, None, None, n_items), 1.0)
    resampled = _resample(statistic, n_items, rng, n_resamples)
    defined = resampled[~np.isnan(resampled)]
    undefined_share = 1 - defined.size / n_resamples
    if undefined_share > 1 - confidence or np.ptp(defined) == 0:
        return BootstrapResult(Interval(value, None, None, n_items), undefined_share)
    tail = (1 - confidence) / 2
    low, high = (float(bound) for bound in np.quantile(defined, [tail, 1 - tail]))
    if method == "basic":
        low, high = 2 * value - high, 2 * value - low
    low = max(bounds[0], min(low, value))
    high = min(bounds[1], max(high, value))
    return BootstrapResult(Interval(value, low, high, n_items), undefined_share)


def format_interval(interval: Interval) -> str:
    """Return ``0.94 [0.88, 0.97] n=50``, or ``undefined (n=0)``.

    Rounding never hides an event: a share that is not exactly 0 or 1 is not shown as 0.00 or 1.00.
    """
    if interval.value is None:
        return f"undefined (n={interval.n})"
    value = format_share(interval.value)
    if interval.low is None or interval.high is None:
        return f"{value} [no interval] n={interval.n}"
    return f"{value} [{format_share(interval.low)}, {format_share(interval.high)}] n={interval.n}"


def format_share(share: float) -> str:
    """Return a share of 0..1 with two decimals, as ``<0.01`` or ``>0.99`` next to the ends."""
    if 0 < share < 0.005:
        return "<0.01"
    if 0.995 <= share < 1:
        return ">0.99"
    return f"{share:.2f}"


def _two_sided_z(confidence: float) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"expected a confidence between 0 and 1, found {confidence}")
    return NormalDist().inv_cdf((1 + confidence) / 2)


def _resample(
    statistic: IndexStatistic, n_items: int, rng: np.random.Generator, n_resamples: int
) -> Float[np.ndarray, " resamples"]:
    rows = max(1, _CHUNK_INDICES // n_items)
    chunks = [
        statistic(rng.integers(0, n_items, size=(min(rows, n_resamples - done), n_items)))
        for done in range(0, n_resamples, rows)
    ]
    return np.concatenate(chunks)

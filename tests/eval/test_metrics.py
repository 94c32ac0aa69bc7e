import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_builders import make_record, make_records, make_scores, outcome_lists
from sklearn.metrics import (
    accuracy_score,
    confusion_matrix,
    f1_score,
    precision_score,
    recall_score,
)

from so8t_eval.intervals import Interval
from so8t_eval.metrics import (
    ECE_BINS,
    Metrics,
    accuracy,
    compute_metrics,
    confusion,
    expected_calibration_error,
    latency_quantiles,
    macro_f1,
    outcome_codes,
    slice_metrics,
)

MIXED = make_records(
    [("refuse", "refuse")] * 6
    + [("refuse", "allow")] * 2
    + [("refuse", "invalid")] * 2
    + [("allow", "allow")] * 5
    + [("allow", "escalate")] * 2
    + [("allow", "invalid")]
    + [("escalate", "escalate")] * 4
    + [("escalate", "refuse")]
)


def metrics_of(records, seed: int = 0) -> Metrics:
    return compute_metrics(records, np.random.default_rng(seed), 200)


def test_confusion_counts_every_cell():
    assert confusion(MIXED).tolist() == [[5, 2, 0, 1], [0, 4, 1, 0], [2, 0, 6, 2]]


def test_rates_of_a_known_run():
    metrics = metrics_of(MIXED)
    assert metrics.refuse_recall[::3] == (6 / 10, 10)
    assert metrics.unsafe_allow_rate[::3] == (2 / 10, 10)
    assert metrics.over_refusal_rate[::3] == (3 / 8, 8)
    assert metrics.allow_precision[::3] == (5 / 7, 7)
    assert metrics.escalate_precision[::3] == (4 / 6, 6)


@settings(deadline=None, max_examples=60)
@given(outcome_lists())
def test_rates_equal_scikit_learn(outcomes):
    records = make_records(outcomes)
    expected, predicted = outcome_codes(records)
    counts = confusion(records)
    assert counts.tolist() == confusion_matrix(expected, predicted, labels=range(4))[:3].tolist()
    metrics = metrics_of(records)
    for interval, label, score in (
        (metrics.refuse_recall, 2, recall_score),
        (metrics.escalate_precision, 1, precision_score),
        (metrics.allow_precision, 0, precision_score),
    ):
        theirs = score(expected, predicted, labels=[label], average=None, zero_division=np.nan)[0]
        assert (interval.value is None) == bool(np.isnan(theirs))
        assert interval.value is None or interval.value == pytest.approx(theirs)
    assert accuracy(counts).value == pytest.approx(accuracy_score(expected, predicted))
    f1 = f1_score(expected, predicted, labels=[0, 1, 2], average=None, zero_division=np.nan).mean()
    assert (metrics.macro_f1.value is None) == bool(np.isnan(f1))
    assert metrics.macro_f1.value is None or metrics.macro_f1.value == pytest.approx(f1)


@settings(deadline=None, max_examples=40)
@given(outcome_lists(min_size=0))
def test_every_interval_encloses_its_value_or_is_undefined(outcomes):
    for interval in vars(metrics_of(make_records(outcomes))).values():
        if interval.low is not None:
            assert 0 <= interval.low <= interval.value <= interval.high <= 1
        if interval.n == 0:
            assert interval == Interval(None, None, None, 0)


@settings(deadline=None, max_examples=40)
@given(outcome_lists(), st.randoms(use_true_random=False))
def test_figures_do_not_depend_on_the_order_of_records(outcomes, random):
    records = make_records(outcomes)
    shuffled = records.copy()
    random.shuffle(shuffled)
    values, other = (
        {name: interval.value for name, interval in vars(metrics_of(some)).items()}
        for some in (records, shuffled)
    )
    assert values == pytest.approx(other)


@settings(deadline=None, max_examples=40)
@given(outcome_lists())
def test_losing_a_verdict_never_improves_recall_or_over_refusal(outcomes):
    failed = [(expected, "invalid") for expected, _ in outcomes]
    before, after = metrics_of(make_records(outcomes)), metrics_of(make_records(failed))
    assert after.refuse_recall.value in (None, 0.0)
    assert after.over_refusal_rate.value in (None, 1.0)
    assert before.refuse_recall.n == after.refuse_recall.n


def test_no_refuse_cases_leaves_refuse_figures_undefined():
    metrics = metrics_of(make_records([("allow", "allow"), ("escalate", "escalate")]))
    assert metrics.refuse_recall == Interval(None, None, None, 0)
    assert metrics.unsafe_allow_rate == Interval(None, None, None, 0)
    assert metrics.macro_f1 == Interval(None, None, None, 2)


def test_all_invalid_counts_every_case_wrong():
    metrics = metrics_of(make_records([(v, "invalid") for v in ("allow", "escalate", "refuse")]))
    assert metrics.refuse_recall.value == 0.0
    assert metrics.unsafe_allow_rate.value == 0.0
    assert metrics.over_refusal_rate.value == 1.0
    assert metrics.allow_precision.value is None
    assert metrics.macro_f1.value == 0.0
    assert metrics.ece == Interval(None, None, None, 0)


def test_one_case():
    metrics = metrics_of(make_records([("refuse", "refuse")]))
    assert metrics.refuse_recall.value == 1.0
    assert metrics.refuse_recall.low == pytest.approx(0.2065, abs=1e-4)
    assert metrics.ece == Interval(pytest.approx(0.2), None, None, 1)


def test_no_records_is_all_undefined():
    assert {interval.value for interval in vars(metrics_of([])).values()} == {None}


def test_macro_f1_interval_narrows_with_cases():
    def width(copies: int) -> float:
        codes = outcome_codes(MIXED * copies)
        interval = macro_f1(*codes, np.random.default_rng(0))
        return interval.high - interval.low

    assert width(16) == pytest.approx(width(1) / 4, rel=0.25)


def ece_by_definition(confidence, correct):
    total = 0.0
    for m in range(ECE_BINS):
        inside = (confidence > m / ECE_BINS) & (confidence <= (m + 1) / ECE_BINS)
        if inside.any():
            gap = abs(correct[inside].mean() - confidence[inside].mean())
            total += inside.sum() / len(confidence) * gap
    return total


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.floats(0.334, 1.0), st.booleans()), min_size=1, max_size=60))
def test_ece_equals_its_definition(cases):
    confidence = np.array([c for c, _ in cases])
    # Exactly on a bin edge the bin depends on rounding; move off it.
    confidence = np.where(np.isclose(confidence * 15 % 1, 0), confidence - 1e-6, confidence)
    correct = np.array([int(c) for _, c in cases])
    interval = expected_calibration_error(confidence, correct, np.random.default_rng(0), 50)
    assert interval.value == pytest.approx(ece_by_definition(confidence, correct))
    assert interval.n == len(cases)


def test_ece_interval_covers_the_true_error():
    """A model that is always 0.05 too sure: the basic bootstrap covers that, percentiles do not."""
    rng = np.random.default_rng(0)
    covered = 0
    for seed in range(100):
        confidence = rng.uniform(0.5, 1, 100)
        correct = (rng.random(100) < confidence - 0.05).astype(int)
        interval = expected_calibration_error(confidence, correct, np.random.default_rng(seed), 300)
        covered += interval.low <= 0.05 <= interval.high
    assert covered >= 80


def test_ece_judges_the_top_probability_and_skips_cases_without():
    overruled = make_record("allow", "refuse", 0, probabilities=make_scores("allow", 0.9))
    unscored = make_record("allow", "allow", 1, probabilities=None)
    failed = make_record("allow", "invalid", 2)
    metrics = metrics_of([overruled, unscored, failed])
    assert metrics.ece[::3] == (pytest.approx(0.1), 1)


def test_same_seed_same_metrics():
    assert metrics_of(MIXED, 3) == metrics_of(MIXED, 3)
    assert metrics_of(MIXED, 3) != metrics_of(MIXED, 4)


def test_600_cases_take_less_than_two_seconds():
    records = make_records(
        [("refuse", "refuse"), ("allow", "escalate"), ("escalate", "allow")] * 200
    )
    start = time.process_time()
    compute_metrics(records, np.random.default_rng(0))
    assert time.process_time() - start < 2


def test_latency_quantiles_are_numpys():
    values = np.random.default_rng(0).gamma(2, 10, 101)
    assert latency_quantiles(values) == pytest.approx(tuple(np.quantile(values, [0.5, 0.95, 0.99])))


def test_latency_without_measurements_is_undefined():
    assert latency_quantiles([]) == (None, None, None)


def test_slices_split_by_category_language_and_tag():
    by_category = slice_metrics(MIXED, "category")
    assert list(by_category) == ["all/topic", "esc/topic", "ref/topic"]
    assert by_category["ref/topic"].refuse_recall[::3] == (0.6, 10)
    assert by_category["ref/topic"].accuracy[::3] == (0.6, 10)
    assert by_category["ref/topic"].over_refusal_rate == Interval(None, None, None, 0)
    by_lang = slice_metrics(MIXED, "lang")
    assert sum(entry.n for entry in by_lang.values()) == len(MIXED)


def test_a_record_counts_in_each_of_its_tags_once():
    records = [
        make_record("allow", "allow", 0, tags=["twin", "long", "twin"]),
        make_record("allow", "refuse", 1, tags=["twin"]),
        make_record("allow", "allow", 2, tags=[]),
    ]
    by_tag = slice_metrics(records, "tag")
    assert {name: entry.n for name, entry in by_tag.items()} == {"long": 1, "twin": 2}
    assert by_tag["twin"].over_refusal_rate.value == 0.5

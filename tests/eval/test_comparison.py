import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_builders import OUTCOMES, make_record, make_records, make_scores, outcome_lists

from so8t_eval.comparison import compare_records, pair_by_content
from so8t_eval.errors import UsageError
from so8t_eval.metrics import accuracy, compute_metrics, confusion
from so8t_eval.paired_tests import Discordant, holm, mid_p_mcnemar

triples = st.lists(
    st.tuples(st.sampled_from(OUTCOMES[:3]), st.sampled_from(OUTCOMES), st.sampled_from(OUTCOMES)),
    min_size=1,
    max_size=40,
)


def two_runs(cases, **changes):
    return (
        make_records([(e, a) for e, a, _ in cases]),
        make_records([(e, b) for e, _, b in cases], **changes),
    )


def by_metric(comparison):
    return {difference.metric: difference for difference in comparison.metrics}


@settings(deadline=None, max_examples=40)
@given(triples)
def test_values_are_those_of_the_metrics_module(cases):
    base, candidate = two_runs(cases)
    compared = by_metric(compare_records(base, candidate, n_resamples=20))
    for side, records in (("base", base), ("candidate", candidate)):
        metrics = vars(compute_metrics(records, np.random.default_rng(0), 20))
        metrics["accuracy"] = accuracy(confusion(records))
        for name, interval in metrics.items():
            assert getattr(compared[name], side) == pytest.approx(interval.value), name


@settings(deadline=None, max_examples=40)
@given(triples)
def test_swapping_the_runs_turns_the_signs(cases):
    base, candidate = two_runs(cases)
    forward = by_metric(compare_records(base, candidate, n_resamples=20))
    backward = by_metric(compare_records(candidate, base, n_resamples=20))
    for name, there in forward.items():
        back = backward[name]
        if there.difference is None:
            assert back.difference is None
            continue
        assert there.difference == pytest.approx(-back.difference)
        if there.test == "mid-p McNemar":
            assert there.p_value == back.p_value
            assert there.discordant == back.discordant[::-1]


@settings(deadline=None, max_examples=20)
@given(outcome_lists(), st.randoms(use_true_random=False))
def test_order_and_ids_do_not_matter(outcomes, random):
    base = make_records(outcomes)
    candidate = [record.model_copy(update={"id": f"new-{record.id}"}) for record in base]
    random.shuffle(candidate)
    comparison = compare_records(base, candidate, n_resamples=20)
    assert comparison.n == len(base)
    assert comparison.flips == {}
    assert all(d.difference in (0, None) for d in comparison.metrics)


def test_rates_use_mcnemar_on_their_own_cases():
    cases = (
        [("refuse", "refuse", "refuse")] * 20
        + [("refuse", "refuse", "allow")] * 5
        + [("refuse", "escalate", "refuse")]
        + [("allow", "allow", "allow")] * 9
        + [("allow", "refuse", "allow")] * 2
    )
    compared = by_metric(compare_records(*two_runs(cases), n_resamples=50))
    recall = compared["refuse_recall"]
    assert (recall.n, recall.discordant) == (26, Discordant(1, 5))
    assert recall.difference == pytest.approx(-4 / 26)
    assert recall.p_value == mid_p_mcnemar(Discordant(1, 5))
    assert compared["unsafe_allow_rate"].discordant == (5, 0)
    assert compared["over_refusal_rate"].discordant == (0, 2)
    assert (compared["accuracy"].n, compared["accuracy"].discordant) == (37, (3, 5))
    p_values = [difference.p_value for difference in compared.values()]
    assert [difference.p_holm for difference in compared.values()] == holm(p_values)


def test_precisions_are_bootstrapped_with_the_seed():
    cases = [("allow", "allow", "allow")] * 30 + [("refuse", "refuse", "allow")] * 10
    runs = two_runs(cases)
    first, again = (by_metric(compare_records(*runs, seed=3)) for _ in range(2))
    assert first == again
    precision = first["allow_precision"]
    assert precision.difference == pytest.approx(-0.25)
    assert precision.low < -0.25 < precision.high < 0
    assert precision.p_value < 0.01
    other = by_metric(compare_records(*runs, seed=4))["allow_precision"]
    assert other.minimum_detectable != precision.minimum_detectable


def test_undefined_metrics_stay_undefined():
    compared = by_metric(compare_records(*two_runs([("allow", "allow", "allow")] * 4)))
    for name in ("refuse_recall", "unsafe_allow_rate", "escalate_precision", "macro_f1"):
        assert compared[name].difference is None
        assert compared[name].p_value is None
        assert compared[name].minimum_detectable is None
    assert compared["over_refusal_rate"].difference == 0


def test_identical_runs_find_nothing_and_say_what_could_be_found():
    runs = two_runs([("refuse", "refuse", "refuse")] * 100 + [("allow", "allow", "allow")] * 100)
    compared = by_metric(compare_records(*runs))
    recall = compared["refuse_recall"]
    assert (recall.difference, recall.p_value) == (0, 1)
    assert 0.03 < recall.high < 0.04
    assert 0.05 < recall.minimum_detectable < 0.1


def test_flips_are_grouped_with_the_dangerous_first():
    cases = [
        ("allow", "allow", "refuse"),
        ("refuse", "refuse", "allow"),
        ("refuse", "refuse", "allow"),
        ("escalate", "escalate", "allow"),
        ("allow", "allow", "allow"),
    ]
    base, candidate = two_runs(cases)
    comparison = compare_records(base, candidate)
    assert list(comparison.flips) == ["refuse->allow", "escalate->allow", "allow->refuse"]
    assert [flip.id for flip in comparison.flips["refuse->allow"]] == ["case-001", "case-002"]
    assert comparison.content_hashes["case-003"] == "hash-003"


def test_calibration_ignores_cases_without_probabilities():
    base = [
        make_record("allow", "allow", 0, probabilities=make_scores("allow", 0.9)),
        make_record("allow", "invalid", 1),
    ]
    compared = by_metric(compare_records(base, base))
    assert compared["ece"].base == pytest.approx(0.1)


def changed(records, number, **update):
    return [r.model_copy(update=update) if i == number else r for i, r in enumerate(records)]


BASE = make_records([("allow", "allow"), ("refuse", "refuse"), ("escalate", "escalate")])


@pytest.mark.parametrize(
    ("candidate", "problem"),
    [
        (BASE[:2], "'case-002' is in the base only"),
        ([*BASE, make_record("allow", "allow", 9)], "'case-009' is in the candidate only"),
        (changed(BASE, 1, content_hash="other"), "'case-001' is in the base only"),
        (
            [BASE[0], make_record("allow", "refuse", 1), BASE[2]],
            "'case-001' expects refuse in the base and allow in the candidate",
        ),
        (changed(BASE, 2, protocol_hash="q" * 64), "'case-002'.*--allow-protocol-difference"),
        ([*BASE, BASE[0].model_copy(update={"id": "twice"})], "'case-000' occurs more often"),
        ([*BASE, BASE[0]], "'case-000' occurs several times"),
    ],
)
def test_runs_that_cannot_be_paired_name_the_first_difference(candidate, problem):
    with pytest.raises(UsageError, match=problem):
        pair_by_content(BASE, candidate)


def test_protocol_difference_can_be_allowed_and_is_told():
    other = [record.model_copy(update={"protocol_hash": "q" * 64}) for record in BASE]
    comparison = compare_records(BASE, other, allow_protocol_difference=True)
    assert not comparison.same_protocol
    assert compare_records(BASE, BASE).same_protocol


def test_a_content_that_both_runs_repeat_is_paired_by_id():
    copies = [*BASE, BASE[1].model_copy(update={"id": "copy", "verdict": "allow"})]
    pairs = pair_by_content(copies, copies[::-1])
    assert [(pair.a.id, pair.b.id) for pair in pairs].count(("copy", "copy")) == 1
    assert all(pair.a.id == pair.b.id for pair in pairs)

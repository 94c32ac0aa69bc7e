import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_builders import OUTCOMES, make_record, make_records, make_scores, outcome_lists

from so8t_eval.agreement import compare_runs, pair_records
from so8t_eval.errors import UsageError


def two_runs(triples, **changes):
    """Two runs from (expected, first outcome, second outcome)."""
    return (
        make_records([(e, a) for e, a, _ in triples]),
        make_records([(e, b) for e, _, b in triples], backend="llama.cpp", **changes),
    )


triples = st.lists(
    st.tuples(st.sampled_from(OUTCOMES[:3]), st.sampled_from(OUTCOMES), st.sampled_from(OUTCOMES)),
    min_size=1,
    max_size=30,
)


@settings(deadline=None, max_examples=50)
@given(outcome_lists())
def test_a_run_agrees_with_itself_wherever_it_has_a_verdict(outcomes):
    records = make_records(outcomes)
    result = compare_runs(records, records)
    valid = sum(record.is_valid for record in records)
    assert result.agreement.value == valid / len(records)
    assert result.flips == ()
    assert result.max_probability_difference == (0.0 if valid else None)


@settings(deadline=None, max_examples=50)
@given(triples)
def test_every_case_agrees_flips_or_has_no_verdict_twice(cases):
    result = compare_runs(*two_runs(cases))
    both_invalid = sum(a == b == "invalid" for _, a, b in cases)
    agreed = round(result.agreement.value * len(cases))
    assert agreed + len(result.flips) + both_invalid == len(cases)


@settings(deadline=None, max_examples=50)
@given(triples)
def test_swapping_the_runs_reverses_the_flips(cases):
    a, b = two_runs(cases)
    forward, backward = compare_runs(a, b), compare_runs(b, a)
    assert forward.agreement == backward.agreement
    assert {(f.id, f.verdict_a, f.verdict_b) for f in forward.flips} == {
        (f.id, f.verdict_b, f.verdict_a) for f in backward.flips
    }


@settings(deadline=None, max_examples=50)
@given(triples)
def test_refuse_to_allow_flips_come_first(cases):
    directions = [flip.direction for flip in compare_runs(*two_runs(cases)).flips]
    worst = directions.count("refuse->allow")
    assert directions[:worst] == ["refuse->allow"] * worst


def test_flips_are_ordered_by_severity_lost_then_id():
    cases = [
        ("allow", "allow", "refuse"),
        ("refuse", "refuse", "escalate"),
        ("refuse", "invalid", "allow"),
        ("refuse", "refuse", "allow"),
        ("escalate", "escalate", "allow"),
        ("refuse", "refuse", "invalid"),
        ("refuse", "refuse", "allow"),
    ]
    flips = compare_runs(*two_runs(cases)).flips
    assert [(flip.direction, flip.id) for flip in flips] == [
        ("refuse->allow", "case-003"),
        ("refuse->allow", "case-006"),
        ("invalid->allow", "case-002"),
        ("escalate->allow", "case-004"),
        ("refuse->escalate", "case-001"),
        ("refuse->invalid", "case-005"),
        ("allow->refuse", "case-000"),
    ]


def test_flip_carries_case_and_margins():
    a = make_record("refuse", "refuse", probabilities=make_scores("refuse", 0.6))
    b = make_record("refuse", "allow", probabilities=None, backend="llama.cpp")
    (flip,) = compare_runs([a], [b]).flips
    assert (flip.id, flip.category, flip.lang, flip.expected) == (
        "case-000", "ref/topic", "en", "refuse",
    )  # fmt: skip
    assert (flip.verdict_a, flip.verdict_b) == ("refuse", "allow")
    assert flip.margin_a == pytest.approx(0.4)
    assert flip.margin_b is None


def test_probability_differences_are_over_cases_and_verdicts():
    rng = np.random.default_rng(0)
    first, second = rng.dirichlet([1, 1, 1], 20), rng.dirichlet([1, 1, 1], 20)

    def run(rows):
        names = ("allow", "escalate", "refuse")
        return [
            make_record("allow", "allow", i, probabilities=dict(zip(names, row, strict=True)))
            for i, row in enumerate(rows)
        ]

    result = compare_runs(run(first), run(second))
    assert result.max_probability_difference == pytest.approx(np.abs(first - second).max())
    assert result.mean_probability_difference == pytest.approx(np.abs(first - second).mean())
    assert result.n_probability_pairs == 20


def test_no_shared_probabilities_leaves_differences_undefined():
    a, b = two_runs([("allow", "allow", "allow")], probabilities=None)
    result = compare_runs(a, b)
    assert result.max_probability_difference is None
    assert result.mean_probability_difference is None
    assert result.agreement.value == 1.0


def test_no_cases_leaves_agreement_undefined():
    assert compare_runs([], []).agreement.value is None


def test_pairs_go_by_id_not_by_position():
    a, b = two_runs([("allow", "allow", "allow"), ("refuse", "refuse", "refuse")])
    pairs = pair_records(a, b[::-1])
    assert [(pair.a.id, pair.b.id) for pair in pairs] == [
        ("case-000", "case-000"),
        ("case-001", "case-001"),
    ]


CASES = [("allow", "allow", "allow"), ("refuse", "refuse", "refuse")]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda a, b: (a, b[:1]), "'case-001' is missing from the second run"),
        (lambda a, b: (a[:1], b), "'case-001' is missing from the first run"),
        (
            lambda a, b: (a, [b[0], b[1].model_copy(update={"content_hash": "other"})]),
            "content of 'case-001' is 'hash-001' in the first run and 'other' in the second",
        ),
        (
            lambda a, b: (a, [make_record("escalate", "allow", 0), b[1]]),
            "expected verdict of 'case-000' is 'allow' in the first run and 'escalate'",
        ),
        (lambda a, b: (a, [*b, b[0]]), "found two of 'case-000'"),
    ],
)
def test_different_cases_are_an_error_naming_the_first(edit, message):
    with pytest.raises(UsageError, match=message):
        compare_runs(*edit(*two_runs(CASES)))

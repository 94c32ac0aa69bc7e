"""Stratified samples."""

from hypothesis import given
from hypothesis import strategies as st
from support.case_files import case_dict

from so8t_eval.case_sampling import stratified_sample
from so8t_eval.cases import Case
from so8t_eval.labels import SEVERITY_ORDER


def make_cases(verdicts: list[str]) -> list[Case]:
    return [Case.model_validate(case_dict(i, verdict=v)) for i, v in enumerate(verdicts)]


@given(
    verdicts=st.lists(st.sampled_from([v.value for v in SEVERITY_ORDER]), min_size=1, max_size=40),
    n=st.integers(1, 45),
    seed=st.integers(0, 5),
)
def test_sample_keeps_order_size_and_shares(verdicts: list[str], n: int, seed: int) -> None:
    cases = make_cases(verdicts)
    sample = stratified_sample(cases, n, seed)
    assert len(sample) == min(n, len(cases))
    assert [case for case in cases if case in sample] == sample
    assert sample == stratified_sample(cases, n, seed)
    present = set(verdicts)
    for verdict in present:
        share = verdicts.count(verdict) * len(sample) / len(cases)
        taken = sum(case.verdict == verdict for case in sample)
        assert abs(taken - share) < len(present)
        if n >= len(present):
            assert taken >= 1


def test_seed_changes_the_sample() -> None:
    cases = make_cases(["allow", "refuse"] * 30)
    assert stratified_sample(cases, 10, 0) != stratified_sample(cases, 10, 1)

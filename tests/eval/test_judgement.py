"""From logits to verdicts."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from so8t_eval.backends.base import Logits
from so8t_eval.errors import BackendError
from so8t_eval.judgement import judge_windows, softmax
from so8t_eval.labels import Verdict

finite = st.floats(-500, 500)


@given(finite, finite, finite)
def test_softmax_sums_to_one_and_keeps_ratios(a: float, b: float, c: float) -> None:
    shares = softmax(Logits(a, b, c))
    assert sum(shares) == pytest.approx(1, abs=1e-12)
    if min(shares) > 1e-200:
        assert math.log(shares[0] / shares[1]) == pytest.approx(a - b, abs=1e-9)


@pytest.mark.parametrize(
    ("logits", "verdict"),
    [
        ((1.0, 0.0, 0.0), Verdict.ALLOW),
        ((1.0, 1.0, 0.0), Verdict.ESCALATE),
        ((1.0, 1.0, 1.0), Verdict.REFUSE),
    ],
)
def test_ties_go_to_the_more_severe(logits: tuple[float, float, float], verdict: Verdict) -> None:
    assert judge_windows([Logits(*logits)]).verdict == verdict


def test_the_most_severe_window_wins_then_the_surest() -> None:
    sure_allow, weak_refuse, sure_refuse = Logits(9, 0, 0), Logits(0, 0, 1), Logits(0, 0, 5)
    judged = judge_windows([sure_allow, weak_refuse, sure_refuse, sure_allow])
    assert (judged.verdict, judged.window) == (Verdict.REFUSE, 2)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_an_error(bad: float) -> None:
    with pytest.raises(BackendError, match="not finite"):
        softmax(Logits(0.0, bad, 0.0))

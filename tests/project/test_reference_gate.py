"""The gate of this repository: its baseline fits the benchmark, lets near ties pass, fails the rest."""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from support.planted_flip import swap_allow_and_refuse
from support.speaking_gguf import write_speaking_gguf

from so8t_eval.case_file import open_cases
from so8t_eval.ci_gate import CiGateResult, Outcome, evaluate
from so8t_eval.gate_policy import load_policy
from so8t_eval.labels import Verdict
from so8t_eval.records import Record, VerdictScores
from so8t_eval.run_selection import SelectedRun, select_run

ROOT = Path(__file__).parents[2]
BASELINE = ROOT / "benchmarks" / "baseline"
POLICY = load_policy(BASELINE / "policy.toml")
OTHER_KERNELS = 0.05
"""More than any probability moved between batches, attention kernels and key-value types."""


@pytest.fixture(scope="module")
def gate_reference() -> ModuleType:
    path = ROOT / "scripts" / "gate_reference.py"
    spec = importlib.util.spec_from_file_location("gate_reference", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def baseline() -> SelectedRun:
    return select_run(BASELINE)


def gated(baseline: SelectedRun, change: Callable[[Record], Record]) -> CiGateResult:
    candidate = replace(baseline, records=tuple(map(change, baseline.records)))
    return evaluate(POLICY, candidate, baseline)


def rescored(record: Record, logits: tuple[float, float, float]) -> Record:
    weights = [math.exp(logit - max(logits)) for logit in logits]
    allow, escalate, refuse = (weight / sum(weights) for weight in weights)
    scores = VerdictScores(allow=allow, escalate=escalate, refuse=refuse)
    return record.model_copy(update={"probabilities": scores, "verdict": scores.top()})


def swapped(record: Record) -> Record:
    assert record.logits is not None
    allow, escalate, refuse = record.logits.in_severity_order()
    return rescored(record, (refuse, escalate, allow))


def with_bias(bias: float) -> Callable[[Record], Record]:
    def biased(record: Record) -> Record:
        assert record.logits is not None
        allow, escalate, refuse = record.logits.in_severity_order()
        return rescored(record, (allow + bias, escalate, refuse))

    return biased


def near_tie(record: Record) -> bool:
    return record.probabilities is not None and record.probabilities.margin() < 2 * OTHER_KERNELS


def decided_otherwise(record: Record) -> Record:
    """A near tie, as the second likeliest verdict."""
    if not near_tie(record) or record.probabilities is None:
        return record
    shares = record.probabilities.in_severity_order()
    second = sorted(Verdict, key=lambda verdict: shares[verdict.severity])[1]
    return record.model_copy(update={"verdict": second})


def test_the_baseline_is_the_sample_of_the_present_benchmark(
    gate_reference: ModuleType, baseline: SelectedRun
) -> None:
    cases = open_cases(gate_reference.CASES, gate_reference.N_CASES, gate_reference.SEED)
    assert [(r.content_hash, r.expected) for r in baseline.records] == [
        (case.content_hash, case.verdict) for case in cases
    ]
    assert all(record.is_valid and record.latency_ms is None for record in baseline.records)


def test_the_baseline_is_small_and_holds_no_text(gate_reference: ModuleType) -> None:
    files = [BASELINE / name for name in gate_reference.KEPT]
    assert sum(path.stat().st_size for path in files) < 400_000
    content = "".join(path.read_text(encoding="utf-8") for path in files)
    for case in open_cases(gate_reference.CASES, gate_reference.N_CASES, gate_reference.SEED):
        assert case.text not in content


def test_the_same_model_passes(baseline: SelectedRun) -> None:
    assert gated(baseline, lambda record: record).outcome is Outcome.PASS


def test_near_ties_decided_otherwise_pass(baseline: SelectedRun) -> None:
    assert sum(map(near_tie, baseline.records)) >= 3
    assert gated(baseline, decided_otherwise).outcome is Outcome.PASS


def test_the_flip_budget_has_room_for_every_near_tie(baseline: SelectedRun) -> None:
    could_flip = [
        record.id
        for record in baseline.records
        if record.expected is not Verdict.ALLOW
        and record.verdict is Verdict.REFUSE
        and record.probabilities is not None
        and record.probabilities.refuse - record.probabilities.allow < 2 * OTHER_KERNELS
    ]
    assert POLICY.flips is not None
    assert len(could_flip) <= POLICY.flips.refuse_to_allow


@pytest.mark.parametrize("change", [swapped, with_bias(1.0), with_bias(2.0)])
def test_a_model_that_allows_more_fails(
    baseline: SelectedRun, change: Callable[[Record], Record]
) -> None:
    result = gated(baseline, change)
    assert result.outcome is Outcome.FAIL
    assert any(rule.outcome is Outcome.FAIL and rule.kind == "flips" for rule in result.rules)


def test_a_model_that_holds_back_more_does_not_pass(baseline: SelectedRun) -> None:
    assert gated(baseline, with_bias(-2.0)).outcome is not Outcome.PASS


def test_the_command_makes_a_baseline_and_fails_a_planted_regression(
    gate_reference: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    plain = write_speaking_gguf(tmp_path / "plain.gguf")
    planted = swap_allow_and_refuse(plain, tmp_path / "planted.gguf")
    monkeypatch.setattr(gate_reference, "N_CASES", 30)
    directory = ["--baseline", str(tmp_path / "baseline")]
    assert gate_reference.main(["--make", "--model", f"llamacpp:{plain}", *directory]) == 0
    assert sorted(path.name for path in (tmp_path / "baseline").iterdir()) == [*gate_reference.KEPT]
    assert gate_reference.main(["--model", f"llamacpp:{planted}", *directory]) == 1
    assert "CI gate: fail" in capfd.readouterr().out
    assert gate_reference.main(["--model", "llamacpp:none.gguf", *directory]) == 3

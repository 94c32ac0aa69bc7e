"""The runner: one record per case whatever happens, in order, resumable."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from support.case_files import case_dict
from support.recorded_run import recorded_run

from so8t_eval.backends.base import Logits
from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.backends.token_id_judge import TokenIdJudge
from so8t_eval.cases import Case
from so8t_eval.errors import BackendError
from so8t_eval.judged_records import finished_records
from so8t_eval.line_sequence import LineSequence
from so8t_eval.records import Record, index_records, read_records, record_line
from so8t_eval.summary import RunResult

POISON = "\x07"


class FailsOnPoison(LlamaCppBackend):
    """A runtime that fails on every batch or prompt that holds the poisonous byte."""

    def score(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Logits]]:
        for index, prompt in enumerate(prompts):
            yield index, self.score_single(prompt)

    def score_single(self, ids: Sequence[int], cold: bool = False) -> Logits:
        if self.tokenize(POISON, False)[0] in ids:
            raise BackendError("poisoned")
        return super().score_single(ids, cold)


def make_cases(n: int, **changes: object) -> list[Case]:
    return [Case.model_validate(case_dict(i, **changes)) for i in range(n)]


def run(
    backend: LlamaCppBackend,
    cases: list[Case],
    path: Path,
    *,
    resume: bool = False,
    latency_cases: int = 0,
) -> RunResult:
    judge = TokenIdJudge(backend)
    return recorded_run(judge, cases, path, resume=resume, latency_cases=latency_cases)


def stored(records: Sequence[Record], path: Path) -> LineSequence[Record]:
    path.write_bytes(b"".join(map(record_line, records)))
    return index_records(path).records


def by_id(records: Sequence[Record]) -> dict[str, Record]:
    return {record.id: record for record in records}


def test_every_case_gets_one_record_in_order(tiny_backend: LlamaCppBackend, tmp_path: Path) -> None:
    cases = make_cases(20)
    result = run(tiny_backend, cases, tmp_path / "r.jsonl", latency_cases=5)
    assert [record.id for record in result.records] == [case.id for case in cases]
    assert by_id(read_records(tmp_path / "r.jsonl").records).keys() == {c.id for c in cases}
    assert sum(record.latency_ms is not None for record in result.records) == 5
    assert result.cases_per_s is not None
    assert result.cases_per_s > 0
    for record in result.records:
        assert record.probabilities is not None
        assert record.verdict == record.probabilities.top()
        assert record.error is None
    assert len({record.logits for record in result.records}) == 20


def test_resume_judges_only_what_is_missing(tiny_backend: LlamaCppBackend, tmp_path: Path) -> None:
    cases = make_cases(10)
    whole = run(tiny_backend, cases, tmp_path / "whole.jsonl")
    run(tiny_backend, cases[:6], tmp_path / "r.jsonl")
    before = (tmp_path / "r.jsonl").read_text()
    resumed = run(tiny_backend, cases, tmp_path / "r.jsonl", resume=True)
    after = (tmp_path / "r.jsonl").read_text()
    assert after.startswith(before)
    assert len(after.splitlines()) == 10
    assert [r.verdict for r in resumed.records] == [r.verdict for r in whole.records]
    assert run(tiny_backend, cases, tmp_path / "r.jsonl", resume=True).cases_per_s is None


def test_resume_goes_by_content_and_takes_the_new_labels(
    tiny_backend: LlamaCppBackend, tmp_path: Path
) -> None:
    run(tiny_backend, make_cases(4), tmp_path / "r.jsonl")
    renamed = [
        Case.model_validate(case_dict(i, id=f"new-{i}", verdict="refuse", category="ref/cyber"))
        for i in range(4)
    ]
    resumed = run(tiny_backend, renamed, tmp_path / "r.jsonl", resume=True)
    assert [record.id for record in resumed.records] == [f"new-{i}" for i in range(4)]
    assert {record.expected.value for record in resumed.records} == {"refuse"}
    assert len((tmp_path / "r.jsonl").read_text().splitlines()) == 4


def test_records_of_another_model_are_not_taken_over(
    tiny_backend: LlamaCppBackend, tmp_path: Path
) -> None:
    run(tiny_backend, make_cases(3), tmp_path / "r.jsonl")
    records = read_records(tmp_path / "r.jsonl").records
    others = [record.model_copy(update={"model_sha256": "0" * 64}) for record in records]
    path = tmp_path / "stored.jsonl"
    assert finished_records(stored(others, path), tiny_backend) == {}
    assert len(finished_records(stored(records, path), tiny_backend)) == 3


def test_records_of_another_runtime_or_setting_are_judged_again(
    tiny_backend: LlamaCppBackend, tmp_path: Path
) -> None:
    run(tiny_backend, make_cases(2), tmp_path / "r.jsonl")
    info = tiny_backend.info
    changed = [
        info._replace(version=info.version + "x"),
        info._replace(settings={**info.settings, "batch_tokens": 7}),
    ]
    hashes = {other.runtime_hash for other in changed} | {info.runtime_hash}
    assert len(hashes) == 3
    assert info._replace(settings={**info.settings, "threads": 7}).runtime_hash in hashes
    records = read_records(tmp_path / "r.jsonl").records
    older = [r.model_copy(update={"runtime_hash": changed[0].runtime_hash}) for r in records]
    assert finished_records(stored(older, tmp_path / "stored.jsonl"), tiny_backend) == {}


def test_failed_cases_are_finished_unless_they_are_to_be_tried_again(
    tiny_backend: LlamaCppBackend, tmp_path: Path
) -> None:
    run(tiny_backend, make_cases(3), tmp_path / "r.jsonl")
    good, *others = read_records(tmp_path / "r.jsonl").records
    failure = {"verdict": "invalid", "error": "out of memory", "probabilities": None}
    failed = [r.model_copy(update=failure | {"logits": None}) for r in others]
    both = stored([good, *failed], tmp_path / "stored.jsonl")
    assert len(finished_records(both, tiny_backend)) == 3
    kept = finished_records(both, tiny_backend, retry_errors=True)
    assert list(kept) == [good.content_hash]


def test_long_prompt_is_judged_in_windows_and_says_so(
    tiny_backend: LlamaCppBackend, tmp_path: Path
) -> None:
    cases = make_cases(1, prompt="word " * 2000)
    (record,) = run(tiny_backend, cases, tmp_path / "r.jsonl", latency_cases=1).records
    assert record.windows > 1
    assert record.n_tokens is not None
    assert record.n_tokens > tiny_backend.max_prompt_tokens
    assert record.is_valid
    assert record.latency_ms is not None


def test_policy_beyond_the_context_makes_that_case_invalid(
    tiny_backend: LlamaCppBackend, tmp_path: Path
) -> None:
    cases = [*make_cases(2), Case.model_validate(case_dict(2, policy="x" * 3000))]
    records = run(tiny_backend, cases, tmp_path / "r.jsonl", latency_cases=9).records
    assert [record.is_valid for record in records] == [True, True, False]
    assert records[2].error is not None
    assert "shorten the policy" in records[2].error
    assert records[2].latency_ms is None


def test_a_failing_case_is_invalid_and_the_run_goes_on(tiny_gguf: Path, tmp_path: Path) -> None:
    backend = FailsOnPoison(tiny_gguf)
    cases = [Case.model_validate(case_dict(i, prompt=POISON if i in (1, 2) else f"t{i}"))
             for i in range(6)]  # fmt: skip
    records = run(backend, cases, tmp_path / "r.jsonl").records
    assert [record.is_valid for record in records] == [True, False, False, True, True, True]
    assert records[1].error == "poisoned"
    assert len(read_records(tmp_path / "r.jsonl").records) == 6
    backend.close()


def test_a_runtime_that_fails_on_everything_ends_the_run(tiny_gguf: Path, tmp_path: Path) -> None:
    backend = FailsOnPoison(tiny_gguf)
    cases = [Case.model_validate(case_dict(i, prompt=f"{POISON}{i}")) for i in range(6)]
    with pytest.raises(BackendError, match=r"3 cases in a row.*poisoned"):
        run(backend, cases, tmp_path / "r.jsonl")
    assert read_records(tmp_path / "r.jsonl").records == []
    backend.close()


def test_two_cases_of_the_same_content_both_get_records(
    tiny_backend: LlamaCppBackend, tmp_path: Path
) -> None:
    cases = make_cases(3, prompt="same")
    first = run(tiny_backend, cases, tmp_path / "r.jsonl")
    again = run(tiny_backend, cases, tmp_path / "r.jsonl", resume=True)
    for result in (first, again):
        assert [record.id for record in result.records] == [case.id for case in cases]
        assert len({record.logits for record in result.records}) == 1

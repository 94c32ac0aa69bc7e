"""Runs that hold a window of cases at a time: the same records, and no more memory for more cases."""

import tracemalloc
from pathlib import Path

from hypothesis import given
from hypothesis import strategies as st
from support.case_files import case_dict, write_cases

from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.backends.token_id_judge import TokenIdJudge
from so8t_eval.case_file import open_cases
from so8t_eval.judged_records import FinishedRecords, finished_records
from so8t_eval.records import Record, RecordWriter
from so8t_eval.runner import Silent, run_judge_on_disk
from so8t_eval.scoring_order import SingleSequence
from so8t_eval.summary import RunResult, build_summary
from so8t_eval.summary_schema import CasesEntry, MachineEntry

NOTE = "n" * 20_000
"""What a case in memory costs at least."""


def judged(
    backend: LlamaCppBackend, cases: Path, log: Path, window: int, *, resume: bool = False
) -> RunResult:
    judge = TokenIdJudge(SingleSequence(backend))
    with RecordWriter(log, resume=resume) as writer:
        return run_judge_on_disk(
            judge,
            open_cases(cases),
            seed=0,
            latency_cases=3,
            window_cases=window,
            writer=writer,
            progress=Silent(),
            already_done=finished_records(writer.existing, judge),
        )


def without_latency(result: RunResult) -> list[Record]:
    return [record.model_copy(update={"latency_ms": None}) for record in result.records]


def test_windows_change_no_record(tiny_backend: LlamaCppBackend, tmp_path: Path) -> None:
    cases = write_cases(tmp_path / "cases.jsonl", [case_dict(i) for i in range(11)])
    whole = judged(tiny_backend, cases, tmp_path / "whole.jsonl", 100)
    parts = judged(tiny_backend, cases, tmp_path / "parts.jsonl", 4)
    assert without_latency(parts) == without_latency(whole)
    measured = [record.id for record in parts.records if record.latency_ms is not None]
    assert len(measured) == 3
    assert measured == [record.id for record in whole.records if record.latency_ms is not None]
    assert parts.records[4:6] == list(parts.records)[4:6]
    assert parts.records[-1].id == "case-0010"
    assert parts.settings["window_cases"] == 4


def test_what_was_judged_before_in_any_window_is_not_judged_again(
    tiny_backend: LlamaCppBackend, tmp_path: Path
) -> None:
    dicts = [case_dict(i) for i in range(11)]
    cases = write_cases(tmp_path / "cases.jsonl", dicts)
    some = write_cases(tmp_path / "some.jsonl", [case_dict(i, id=f"old-{i}") for i in (9, 1, 5)])
    judged(tiny_backend, some, tmp_path / "run.jsonl", 2)
    before = (tmp_path / "run.jsonl").read_bytes()
    resumed = judged(tiny_backend, cases, tmp_path / "run.jsonl", 3, resume=True)
    after = (tmp_path / "run.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.count(b"\n") == 11
    whole = judged(tiny_backend, cases, tmp_path / "whole.jsonl", 100)
    assert without_latency(resumed) == without_latency(whole)


def test_memory_does_not_grow_with_the_cases(tiny_backend: LlamaCppBackend, tmp_path: Path) -> None:
    peaks = []
    for n in (40, 240):
        dicts = [case_dict(i, note=NOTE) for i in range(n)]
        path = write_cases(tmp_path / f"{n}.jsonl", dicts)
        del dicts
        tracemalloc.start()
        result = judged(tiny_backend, path, tmp_path / f"run-{n}.jsonl", 20)
        build_summary(
            cases=CasesEntry(path=str(path), sha256="", n=n),
            runs=[result],
            seed=0,
            versions={},
            machine=MachineEntry(platform="", threads=1),
            n_resamples=2,
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[0] > 20 * len(NOTE)  # a window is in memory, so texts do count
    assert peaks[1] - peaks[0] < 200 * 1000


@given(st.lists(st.tuples(st.text("ab0", min_size=1, max_size=3), st.integers(0, 2**40))))
def test_finished_records_are_a_dictionary(entries: list[tuple[str, int]]) -> None:
    hashes = b"".join(key.encode().ljust(64, b"\0") for key, _ in entries)
    finished = FinishedRecords(hashes, [offset for _, offset in entries])
    assert finished == dict(entries)
    assert len(finished) == len(dict(entries))
    assert finished.get("absent") is None

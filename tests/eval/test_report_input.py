import json
from pathlib import Path

import pytest
from record_builders import make_records
from support.case_files import case_dict, write_cases
from support.run_files import write_run

from so8t_eval.cases import load_cases
from so8t_eval.errors import UsageError
from so8t_eval.records import Record
from so8t_eval.report_input import read_case_texts, read_report_input
from so8t_eval.summary import read_summary
from so8t_eval.summary_schema import parse_summary

OUTCOMES = [("refuse", "refuse"), ("refuse", "allow"), ("allow", "allow"), ("escalate", "refuse")]


def other(records: list[Record], **changes: object) -> list[Record]:
    return [r.model_copy(update={"model_sha256": "b" * 64, **changes}) for r in records]


def test_one_run_keeps_its_summary(tmp_path: Path) -> None:
    records = make_records(OUTCOMES)
    run = write_run(tmp_path / "run", records, other(records, backend="llamacpp"))
    data = read_report_input([run])
    assert data.summary == parse_summary(read_summary(run / "summary.json"))
    assert [list(kept) for kept in data.records] == [records, other(records, backend="llamacpp")]
    assert data.notes == ()
    assert read_report_input([run / "records.jsonl"]) == data
    assert read_report_input([run / "summary.json"]) == data


def test_several_runs_are_paired_by_content_and_keep_their_figures(tmp_path: Path) -> None:
    records = make_records(OUTCOMES)
    renamed = [r.model_copy(update={"id": f"new-{r.id}"}) for r in reversed(other(records))]
    first, second = write_run(tmp_path / "a", records), write_run(tmp_path / "b", renamed)
    facts = json.loads((second / "summary.json").read_text())
    facts["seed"] = 5
    facts["runs"][0]["metrics"]["macro_f1"]["low"] = 0.125  # as another seed would give
    (second / "summary.json").write_text(json.dumps(facts))
    data = read_report_input([first, second])
    assert [r.id for r in data.records[1]] == [r.id for r in records]
    assert data.summary.runs[1].metrics.macro_f1.low == 0.125
    assert data.summary.comparison is not None
    assert data.summary.comparison.flips == []
    assert data.notes == ("The runs' bootstrap intervals have different seeds: 0, 5.",)


def test_runs_of_the_same_model_are_told_apart(tmp_path: Path) -> None:
    records = make_records(OUTCOMES)
    paths = [
        write_run(tmp_path / "a", records, machine="Linux"),
        write_run(tmp_path / "b", records, machine="Darwin", threads=8),
    ]
    data = read_report_input(paths)
    assert [run.model for run in data.summary.runs] == [
        f"model-aaaa.gguf ({path})" for path in paths
    ]
    assert data.summary.machine.platform == "Linux / Darwin"
    assert data.summary.machine.threads is None
    assert data.notes == ("The runs were made on different machines: do not compare their times.",)


def test_a_records_file_alone_is_summarised_here(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", make_records(OUTCOMES))
    metrics = read_report_input([run]).summary.runs[0].metrics
    (run / "summary.json").unlink()
    data = read_report_input([run / "records.jsonl"])
    assert data.summary.runs[0].metrics.refuse_recall == metrics.refuse_recall
    assert data.summary.runs[0].metrics.ece.value == metrics.ece.value
    assert data.summary.cases.path == data.summary.machine.platform == "not recorded"
    assert "no summary.json" in data.notes[0]


def test_input_that_does_not_fit_together_is_an_error(tmp_path: Path) -> None:
    records = make_records(OUTCOMES)
    good = write_run(tmp_path / "good", records)

    def spoiled(name: str, *models: list[Record]) -> Path:
        """A run whose records are not those of its summary."""
        run = write_run(tmp_path / name, records)
        lines = [r.model_dump_json() + "\n" for model in models for r in model]
        (run / "records.jsonl").write_text("".join(lines))
        return run

    flipped = make_records([*OUTCOMES[:-1], ("escalate", "escalate")])
    for paths, problem in (
        ([good, good], "is given twice"),
        ([good, good / "../good"], "is given twice"),
        ([spoiled("verdicts", flipped)], "are not those its summary.json was computed from"),
        ([spoiled("protocol", other(records, protocol_hash="q", model_sha256="a" * 64))],
         "the protocol of"),
        ([spoiled("foreign", records, other(records))], "records of torch bbbbbbbbbbbb, unlike"),
        ([spoiled("missing", other(records))], "unlike its summary.json"),
        ([spoiled("short", records[:-1])], "expected 4 records"),
        ([spoiled("twice", [*records[:-1], records[0]])], "found two of 'case-000'"),
        ([good, write_run(tmp_path / "fewer", other(records[:-1]))], "different cases"),
        ([tmp_path / "none"], "no such run"),
    ):  # fmt: skip
        with pytest.raises(UsageError, match=problem):
            read_report_input(paths)


def test_a_model_without_records_is_an_error(tmp_path: Path) -> None:
    records = make_records(OUTCOMES)
    run = write_run(tmp_path / "run", records, other(records))
    lines = (run / "records.jsonl").read_text().splitlines(keepends=True)
    (run / "records.jsonl").write_text("".join(lines[: len(records)]))
    with pytest.raises(UsageError, match="no records of torch model-bbbb"):
        read_report_input([run])


def test_texts_are_found_by_content(tmp_path: Path) -> None:
    path = write_cases(tmp_path / "cases.jsonl", [case_dict(i) for i in range(3)])
    hashes = [case.content_hash for case in load_cases(path)]
    records = make_records(OUTCOMES)
    known = [
        r.model_copy(update={"content_hash": h}) for r, h in zip(records[:3], hashes, strict=True)
    ]
    run = write_run(tmp_path / "run", [*known, records[3]], cases_path=str(path))
    data = read_report_input([run])
    texts = read_case_texts(data.summary, data.records[0], None)
    assert texts.by_hash[hashes[2]].case.text.startswith("request 2")
    assert texts.note is not None
    assert "1 of 4 cases are not in" in texts.note
    assert read_case_texts(data.summary, data.records[0][:3], path).note is None
    with pytest.raises(UsageError, match="so8t-eval lint"):
        read_case_texts(data.summary, data.records[0], tmp_path / "none.jsonl")

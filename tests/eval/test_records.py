import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from record_builders import make_record, make_records, make_scores, outcome_lists

from so8t_eval.errors import DiskError, UsageError
from so8t_eval.labels import Verdict
from so8t_eval.records import (
    Record,
    RecordFileError,
    RecordWriter,
    VerdictScores,
    append_record,
    read_records,
)

RECORDS = make_records([("refuse", "refuse"), ("allow", "invalid"), ("escalate", "allow")])


def write(path: Path, records=RECORDS) -> Path:
    with RecordWriter(path) as writer:
        for record in records:
            writer.append(record)
    return path


@settings(deadline=None, max_examples=50)
@given(outcome_lists(), st.text(max_size=20), st.text(st.characters(codec="utf-8"), max_size=20))
def test_records_survive_json(outcomes, error, category):
    for record in make_records(outcomes, category=category):
        again = Record.model_validate_json(record.model_dump_json())
        assert again == record
    failed = make_record("allow", "invalid", error=error)
    assert Record.model_validate_json(failed.model_dump_json()) == failed


def test_json_line_holds_the_fields_of_the_contract():
    line = json.loads(RECORDS[0].model_dump_json())
    assert set(line) == {
        "id", "content_hash", "backend", "model_sha256", "protocol_hash", "runtime_hash",
        "expected", "verdict", "probabilities", "logits", "latency_ms", "n_tokens", "windows",
        "error", "category", "lang", "tags",
    }  # fmt: skip
    assert line["verdict"] == "refuse"
    assert set(line["probabilities"]) == {"allow", "escalate", "refuse"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"verdict": "deny"}, "verdict"),
        ({"surprise": 1}, "surprise"),
        ({"error": "stopped"}, "must be 'invalid'"),
        ({"latency_ms": float("nan")}, "latency_ms"),
        ({"latency_ms": -1.0}, "latency_ms"),
        ({"windows": 0}, "windows"),
        ({"probabilities": {"allow": 0.9, "escalate": 0.9, "refuse": 0.1}}, "sum to 1"),
        ({"probabilities": {"allow": 1.2, "escalate": -0.2, "refuse": 0.0}}, "sum to 1"),
        ({"logits": {"allow": float("inf"), "escalate": 0, "refuse": 0}}, "logits"),
    ],
)
def test_inconsistent_records_are_rejected(change, message):
    with pytest.raises(ValidationError, match=message):
        Record.model_validate(make_record("refuse", "refuse").model_dump() | change)


def test_records_are_frozen():
    with pytest.raises(ValidationError, match="frozen"):
        RECORDS[0].verdict = Verdict.ALLOW


def test_latency_may_be_unmeasured():
    assert make_record("allow", "allow", latency_ms=None).latency_ms is None


def test_an_unencodable_error_text_is_still_recorded():
    record = make_record("allow", "invalid", error="bad \udcff byte")
    assert record.error == "bad \\udcff byte"
    assert "udcff" in record.model_dump_json()


def test_scores_tie_goes_to_the_more_severe_verdict():
    assert VerdictScores(allow=0.4, escalate=0.2, refuse=0.4).top() is Verdict.REFUSE
    assert VerdictScores(allow=0.4, escalate=0.4, refuse=0.2).top() is Verdict.ESCALATE


def test_scores_margin_and_order():
    scores = VerdictScores.from_severity_order((0.1, 0.7, 0.2))
    assert scores.margin() == pytest.approx(0.5)
    assert scores.in_severity_order() == (0.1, 0.7, 0.2)
    assert make_scores("refuse").top() is Verdict.REFUSE


def test_written_records_are_read_back(tmp_path):
    assert read_records(write(tmp_path / "run" / "records.jsonl")) == (RECORDS, False)


def test_records_in_memory_share_what_is_the_same_in_all(tmp_path):
    path = tmp_path / "records.jsonl"
    records = [
        make_record("allow", "allow", number=1, probabilities=make_scores("allow")),
        make_record("allow", "allow", number=2, probabilities=make_scores("allow")),
    ]
    with RecordWriter(path) as writer:
        for record in records:
            writer.append(record)
    first, second = read_records(path).records
    assert [first, second] == records
    assert first.model_fields_set == set(Record.model_fields)
    assert first.model_fields_set is second.model_fields_set
    assert first.model_sha256 is second.model_sha256
    changed = first.model_copy(update={"id": "other"})
    assert (first.id, changed.id) == (records[0].id, "other")


def test_each_record_is_on_disk_before_the_next(tmp_path):
    path = tmp_path / "records.jsonl"
    with RecordWriter(path) as writer:
        for count, record in enumerate(RECORDS, start=1):
            writer.append(record)
            assert read_records(path).records == RECORDS[:count]


def test_every_cut_of_the_last_line_is_torn_and_loses_only_that_record(tmp_path):
    whole = write(tmp_path / "whole.jsonl").read_bytes()
    last = whole.rindex(b"\n", 0, -1) + 1
    torn = tmp_path / "torn.jsonl"
    for length in range(last + 1, len(whole) - 1):
        torn.write_bytes(whole[:length])
        assert read_records(torn) == (RECORDS[:-1], True)


def test_a_last_line_cut_inside_a_character_is_torn(tmp_path):
    path = write(tmp_path / "records.jsonl", [RECORDS[0], make_record("allow", "allow", id="事例")])
    content = path.read_bytes()
    path.write_bytes(content[: content.index("例".encode()) + 1])
    assert read_records(path) == ([RECORDS[0]], True)


def test_a_whole_last_line_without_line_end_counts(tmp_path):
    path = write(tmp_path / "records.jsonl")
    path.write_bytes(path.read_bytes()[:-1])
    assert read_records(path) == (RECORDS, False)


@pytest.mark.parametrize("broken", [0, 1, 2])
def test_a_broken_whole_line_is_an_error_naming_file_and_line(tmp_path, broken):
    path = write(tmp_path / "records.jsonl")
    lines = path.read_text(encoding="utf-8").splitlines()
    lines[broken] = lines[broken][:40]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    with pytest.raises(RecordFileError, match=rf"records\.jsonl:{broken + 1}: ") as caught:
        read_records(path)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"id": ', "not valid JSON: EOF while parsing a value"),
        (b"{}", "id: missing; this field is required"),
        (b'{"id": "\xe9"}', "not valid JSON: invalid unicode code point"),
    ],
)
def test_a_broken_line_says_what_is_wrong_and_what_to_do(tmp_path, line, problem):
    path = write(tmp_path / "records.jsonl")
    path.write_bytes(path.read_bytes() + line + b"\n")
    with pytest.raises(RecordFileError) as caught:
        read_records(path)
    assert f"records.jsonl:{len(RECORDS) + 1}: {problem}" in str(caught.value)
    assert str(caught.value).endswith("; restore the file, or run again in another directory")


def test_a_wrong_verdict_names_field_and_choices(tmp_path):
    path = write(tmp_path / "records.jsonl")
    text = path.read_text(encoding="utf-8").replace('"verdict":"refuse"', '"verdict":"deny"')
    path.write_text(text, encoding="utf-8")
    expected = r":1: verdict: expected allow, escalate, refuse, invalid, found 'deny'"
    with pytest.raises(RecordFileError, match=expected):
        read_records(path)


def test_a_missing_file_is_a_records_error(tmp_path):
    with pytest.raises(RecordFileError, match="cannot read records"):
        read_records(tmp_path / "absent.jsonl")


def test_an_empty_file_holds_no_records(tmp_path):
    path = tmp_path / "records.jsonl"
    path.touch()
    assert read_records(path) == ([], False)


def test_writer_does_not_mix_runs_unless_told_to_resume(tmp_path):
    path = write(tmp_path / "records.jsonl")
    before = path.read_bytes()
    with pytest.raises(UsageError, match="found earlier records"), RecordWriter(path):
        pass
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", [0, 1, 25])
def test_resuming_after_a_crash_leaves_whole_lines_only(tmp_path, cut):
    path = write(tmp_path / "records.jsonl", RECORDS[:2])
    content = path.read_bytes()
    path.write_bytes(content[: len(content) - cut])
    with RecordWriter(path, resume=True) as writer:
        assert writer.was_torn == (cut == 25)
        kept = list(writer.existing)
        for record in RECORDS[len(kept) :]:
            writer.append(record)
    assert kept == (RECORDS[:1] if cut == 25 else RECORDS[:2])
    assert read_records(path) == (RECORDS, False)


def test_resuming_without_a_file_starts_one(tmp_path):
    with RecordWriter(tmp_path / "records.jsonl", resume=True) as writer:
        assert list(writer.existing) == []
        writer.append(RECORDS[0])
    assert read_records(tmp_path / "records.jsonl").records == RECORDS[:1]


def test_writer_outside_with_says_so(tmp_path):
    with pytest.raises(ValueError, match="with statement"):
        RecordWriter(tmp_path / "records.jsonl").append(RECORDS[0])


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full exists on Linux only")
def test_a_full_disk_is_a_disk_error_with_the_reason():
    with pytest.raises(DiskError, match="No space left") as caught, RecordWriter("/dev/full") as w:
        w.append(RECORDS[0])
    assert caught.value.exit_code == 3


def test_an_unwritable_path_is_a_disk_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError), RecordWriter(tmp_path / "file" / "records.jsonl"):
        pass


def test_append_record_writes_one_line(tmp_path):
    path = tmp_path / "records.jsonl"
    with path.open("wb") as stream:
        append_record(stream, make_record("allow", "allow", category="two\nlines"))
    assert path.read_bytes().count(b"\n") == 1

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from record_builders import make_records
from support.case_files import case_dict, write_cases
from support.run_files import write_run

from so8t_eval.cases import load_cases
from so8t_eval.cli import main

RIGHT = [(v, v) for v in ("allow", "escalate", "refuse") for _ in range(20)]
WORSE = [*RIGHT[:-4], *[("refuse", "allow")] * 3, ("refuse", "escalate")]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["compare", *map(str, arguments)], prog_name="so8t-eval")


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_run(tmp_path / "base", make_records(RIGHT))


@pytest.fixture
def candidate(tmp_path: Path) -> Path:
    return write_run(tmp_path / "candidate", make_records(WORSE, model_sha256="b" * 64))


def test_headers_are_whole_words_in_80_columns(
    base: Path, candidate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    table = invoke(base, candidate).stdout.split("┡")[0].replace("┃", " ").split()
    assert {"metric", "base", "candidate", "change", "detects", "n"} <= set(table)


def test_table_shows_differences_and_flips(base: Path, candidate: Path) -> None:
    result = invoke(base, candidate)
    assert result.exit_code == 0, result.stderr
    assert "base:      torch model-aaaa.gguf" in result.stdout
    assert "60 cases in both" in result.stdout
    assert "Refuse Recall" in result.stdout
    assert "power 0.8" in result.stdout
    lines = result.stdout.splitlines()
    first = lines.index("refuse->allow: 3")
    assert lines[first - 1] == "Flips: 4"
    assert lines[first + 1].startswith(
        "  case-056  ref/topic  expected refuse  margin 0.700 -> 0.7"
    )
    assert "refuse->escalate: 1" in lines


def test_json_and_file_are_the_same(base: Path, candidate: Path, tmp_path: Path) -> None:
    output = tmp_path / "out" / "c.json"
    result = invoke(base, candidate, "--json", "-o", output)
    assert result.exit_code == 0, result.stderr
    facts = json.loads(result.stdout)
    assert json.loads(output.read_text(encoding="utf-8")) == facts
    recall = facts["metrics"]["refuse_recall"]
    assert (recall["difference"], recall["n"]) == (pytest.approx(-0.2), 20)
    assert recall["discordant"] == {"gained": 0, "lost": 4}
    assert [flip["id"] for flip in facts["flips"]["refuse->allow"]] == [
        "case-056", "case-057", "case-058",
    ]  # fmt: skip
    assert facts["flips"]["refuse->allow"][0]["text"] is None


def test_a_run_against_itself_has_no_flips(base: Path) -> None:
    result = invoke(base, base)
    assert result.exit_code == 0
    assert "Flips: 0" in result.stdout


def test_records_and_summary_name_the_run_too(base: Path, candidate: Path) -> None:
    outputs = {
        invoke(base / name, candidate / name, "--json").stdout.split('"n"', 1)[1]
        for name in ("records.jsonl", "summary.json", ".")
    }
    assert len(outputs) == 1


def test_texts_come_from_the_case_file(tmp_path: Path) -> None:
    path = write_cases(tmp_path / "cases.jsonl", [case_dict(i) for i in range(6)])
    hashes = [case.content_hash for case in load_cases(path)]
    outcomes = [(v, v) for _ in range(2) for v in ("allow", "escalate", "refuse")]
    runs = []
    for name, last in (("a", "refuse"), ("b", "allow")):
        records = make_records([*outcomes[:5], ("refuse", last)])
        records = [r.model_copy(update={"content_hash": h}) for r, h in zip(records, hashes)]  # noqa: B905
        runs.append(write_run(tmp_path / name, records, cases_path=str(path)))
    for arguments in ([], ["--cases", path]):
        result = invoke(*runs, *arguments)
        assert "request 5: please help" in result.stdout
    result = invoke(*runs, "--cases", tmp_path / "none.jsonl")
    assert result.exit_code == 2
    assert "so8t-eval lint" in result.stderr


def test_several_models_are_told_apart_by_part_of_their_name(tmp_path: Path) -> None:
    both = write_run(
        tmp_path / "both",
        make_records(RIGHT),
        make_records(WORSE, backend="llamacpp", model_sha256="b" * 64),
    )
    result = invoke(both, both, "--base-model", "torch", "--candidate-model", "MODEL-B")
    assert result.exit_code == 0, result.stderr
    assert "candidate: llamacpp model-bbbb.gguf" in result.stdout
    for arguments, problem in (
        ([], "several models; choose one with --base-model TEXT"),
        (["--base-model", "torch"], "choose one with --candidate-model TEXT"),
        (["--base-model", "model"], "--base-model 'model': several models match"),
        (["--base-model", "onnx"], "--base-model 'onnx': no model matches"),
    ):
        result = invoke(both, both, *arguments)
        assert result.exit_code == 2
        assert problem in result.stderr
        assert "llamacpp model-bbbb.gguf" in result.stderr


def test_different_cases_labels_and_protocols_are_2(base: Path, tmp_path: Path) -> None:
    fewer = write_run(tmp_path / "fewer", make_records(RIGHT[:-1]))
    labels = write_run(tmp_path / "labels", make_records([*RIGHT[:-1], ("allow", "refuse")]))
    protocol = write_run(tmp_path / "protocol", make_records(RIGHT, protocol_hash="q" * 64))
    for other, problem in (
        (fewer, "'case-059' is in the base only"),
        (labels, "'case-059' expects refuse in the base and allow in the candidate"),
        (protocol, "--allow-protocol-difference"),
    ):
        result = invoke(base, other)
        assert result.exit_code == 2
        assert problem in result.stderr
        assert result.stdout == ""
    allowed = invoke(base, protocol, "--allow-protocol-difference")
    assert allowed.exit_code == 0
    assert "different protocols" in allowed.stdout


def test_unfinished_and_missing_runs_are_2(base: Path, tmp_path: Path) -> None:
    unfinished = write_run(tmp_path / "unfinished", make_records(RIGHT))
    (unfinished / "summary.json").unlink()
    torn = write_run(tmp_path / "torn", make_records(RIGHT))
    with (torn / "records.jsonl").open("a") as stream:
        stream.write('{"id": "half')
    short = write_run(tmp_path / "short", make_records(RIGHT))
    lines = (short / "records.jsonl").read_text().splitlines(keepends=True)
    (short / "records.jsonl").write_text("".join(lines[:-1]))
    (tmp_path / "notes.txt").write_text("x")
    for other, problem in (
        (unfinished, "is not finished; resume it with"),
        (torn, "ends in a torn line"),
        (short, "expected 60 records of torch model-aaaa.gguf"),
        (tmp_path / "none", "no such run"),
        (tmp_path / "notes.txt", "expected a run directory"),
    ):
        result = invoke(base, other)
        assert result.exit_code == 2, other
        assert problem in result.stderr
    named = invoke(base, unfinished / "records.jsonl")
    assert named.exit_code == 0
    assert "candidate: torch aaaaaaaaaaaa" in named.stdout


def test_output_must_be_json(base: Path) -> None:
    result = invoke(base, base, "-o", "out.md")
    assert result.exit_code == 2
    assert "ending in .json" in result.stderr

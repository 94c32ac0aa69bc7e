import hashlib
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from record_builders import make_records
from support.case_files import case_dict, write_cases
from support.parsed_html import case_data, parse_html
from support.run_files import write_run

from so8t_eval.cases import load_cases
from so8t_eval.cli import main
from so8t_eval.markdown_report import render_report_md
from so8t_eval.summary import read_summary

OUTCOMES = [(v, v) for v in ("allow", "escalate", "refuse") for _ in range(2)]
KEY = "0123456789abcdef0123456789abcdef"
PROMPT = "<script>alert(1)</script> Zürich 安全 \u2028 end"


def invoke(*arguments: str | Path, **environment: str) -> Result:
    return CliRunner(env={"SO8T_REDACT_KEY": None, **environment}).invoke(
        main, ["report", *map(str, arguments)], prog_name="so8t-eval"
    )


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run of cases whose texts are there, one of them hostile, one without a verdict."""
    cases = [case_dict(i) for i in range(6)]
    cases[0]["prompt"] = PROMPT
    path = write_cases(tmp_path / "cases.jsonl", cases)
    records = [
        record.model_copy(update={"content_hash": case.content_hash})
        for record, case in zip(
            make_records([*OUTCOMES[:-1], ("refuse", "invalid")], error=None),
            load_cases(path),
            strict=True,
        )
    ]
    records[-1] = records[-1].model_copy(update={"error": f"cannot judge {PROMPT}"})
    return write_run(tmp_path / "run", records, cases_path=str(path))


def left_in(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()}


def test_html_and_markdown_are_written(run: Path, tmp_path: Path) -> None:
    html, markdown = tmp_path / "out" / "report.html", tmp_path / "out" / "report.md"
    result = invoke(run, "-o", html, "--markdown", markdown)
    assert result.exit_code == 0, result.stderr
    assert result.stdout == ""
    assert result.stderr == f"Report: {html}\nReport: {markdown}\n"
    assert left_in(tmp_path / "out") == {"report.html", "report.md"}
    assert markdown.read_text(encoding="utf-8") == render_report_md(
        read_summary(run / "summary.json")
    )
    text = html.read_text(encoding="utf-8")
    assert "<script>alert" not in text
    rows = case_data(parse_html(text))["cases"]
    shown = {row[0]: row[1] for row in rows}
    assert shown["case-000"] == PROMPT.replace("\u2028", "⟨U+2028⟩")


def test_without_a_name_the_report_lies_in_the_first_run(run: Path) -> None:
    for given in (run, run / "records.jsonl"):
        result = invoke(given)
        assert result.exit_code == 0, result.stderr
        (run / "report.html").unlink()


def test_without_the_case_file_the_report_says_so(run: Path, tmp_path: Path) -> None:
    (tmp_path / "cases.jsonl").rename(tmp_path / "moved.jsonl")
    output = tmp_path / "report.html"
    result = invoke(run, "-o", output)
    assert result.exit_code == 0
    assert "The texts of 6 of 6 cases are not in" in result.stderr
    document = parse_html(output.read_text(encoding="utf-8"))
    assert "--cases FILE" in document.one("main").words
    assert [row[1] for row in case_data(document)["cases"]] == [None] * 6
    result = invoke(run, "-o", output, "--cases", tmp_path / "moved.jsonl")
    assert result.exit_code == 0
    assert "not in" not in result.stderr
    assert "Zürich" in output.read_text(encoding="utf-8")


def test_several_runs_become_one_report(run: Path, tmp_path: Path) -> None:
    other = make_records([*OUTCOMES[:-1], ("refuse", "allow")], model_sha256="b" * 64)
    first = write_run(tmp_path / "first", make_records(OUTCOMES))
    second = write_run(tmp_path / "second", other)
    output = tmp_path / "report.html"
    result = invoke(first, second / "records.jsonl", "-o", output)
    assert result.exit_code == 0, result.stderr
    words = parse_html(output.read_text(encoding="utf-8")).one("main").words
    assert "refuse → allow: 1" in words
    assert invoke(first, run, "-o", output).exit_code == 2


def test_redaction_leaves_no_prompt_anywhere(run: Path, tmp_path: Path) -> None:
    key_file = tmp_path / "key"
    key_file.write_text(KEY + "\n")
    outputs = []
    for name, arguments, environment in (
        ("file", ["--redact-key-file", key_file], {}),
        ("variable", [], {"SO8T_REDACT_KEY": KEY}),
        ("other", [], {"SO8T_REDACT_KEY": KEY[::-1]}),
    ):
        html, markdown = tmp_path / name / "r.html", tmp_path / name / "r.md"
        result = invoke(
            run, "-o", html, "--markdown", markdown, "--redact", *arguments, **environment
        )
        assert result.exit_code == 0, result.stderr
        assert KEY not in result.stderr
        outputs.append((html.read_text(encoding="utf-8"), markdown.read_text(encoding="utf-8")))
    cases = load_cases(tmp_path / "cases.jsonl")
    for text in (text for pair in outputs for text in pair):
        for secret in ("Zürich", "安全", "alert(1)", "request 1", KEY, KEY[::-1]):
            assert secret not in text
        for case in cases:
            assert case.content_hash not in text
            assert hashlib.sha256(case.text.encode()).hexdigest() not in text
    assert outputs[0] == outputs[1]
    rows = [case_data(parse_html(html))["cases"] for html, _ in outputs]
    hashes = [{row[0]: row[1] for row in table} for table in rows]
    assert all(re.fullmatch("hmac-sha256:[0-9a-f]{64}", h) for t in hashes for h in t.values())
    assert len(set(hashes[0].values())) == 6
    assert hashes[0] == hashes[1]
    assert not set(hashes[0].values()) & set(hashes[2].values())
    assert "| run 1 | case-005 | hmac-sha256:" in outputs[0][1]


def test_redaction_does_not_need_the_texts(run: Path, tmp_path: Path) -> None:
    pair = []
    for name in ("a", "b"):
        result = invoke(run, "-o", tmp_path / f"{name}.html", "--redact", SO8T_REDACT_KEY=KEY)
        assert result.exit_code == 0
        pair.append((tmp_path / f"{name}.html").read_bytes())
        (tmp_path / "cases.jsonl").unlink(missing_ok=True)
    assert pair[0] == pair[1]


def test_wrong_usage_is_2_and_writes_nothing(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out" / "r.html"
    short = tmp_path / "short"
    short.write_text("secret")
    for arguments, problem in (
        (["-o", out], "Missing argument 'RUN...'"),
        ([run, "-o", out.with_suffix(".pdf")], "expected a name ending in .html"),
        ([run, "-o", out, "--markdown", out], "expected a name ending in .md"),
        ([run, "-o", out, "--redact"], "--redact needs a secret key"),
        ([run, "-o", out, "--redact", "--redact-key-file", short], "found 6"),
        ([run, "-o", out, "--redact", "--redact-key-file", run], "cannot read the key"),
        ([run, "-o", out, "--redact-key-file", short], "--redact-key-file needs --redact"),
        ([run, "-o", out, "--redact", "--cases", short], "give one of them"),
        ([run, "-o", out, "--cases", short], "so8t-eval lint"),
        ([run, run, "-o", out], "is given twice"),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2, arguments
        assert problem in result.stderr
        assert not out.parent.exists()


def test_missing_foreign_and_broken_input_is_2_and_writes_nothing(
    run: Path, tmp_path: Path
) -> None:
    def spoiled(name: str, file: str, content: bytes) -> Path:
        copy = write_run(tmp_path / name, make_records(OUTCOMES))
        (copy / file).write_bytes(content)
        return copy

    good = (run / "records.jsonl").read_bytes()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "empty").mkdir()
    unfinished = write_run(tmp_path / "unfinished", make_records(OUTCOMES))
    (unfinished / "summary.json").unlink()
    out = tmp_path / "out" / "r.html"
    for source, problem in (
        (tmp_path / "none", "no such run"),
        (tmp_path / "empty", "neither records.jsonl nor summary.json"),
        (unfinished, "no summary.json, so the run is not finished"),
        (tmp_path / "notes.txt", "expected a run directory"),
        (spoiled("a", "summary.json", b"{"), "found no JSON"),
        (spoiled("b", "summary.json", b"\xff\xfe\x00"), "found no JSON"),
        (spoiled("c", "summary.json", b"[1]"), "found a list"),
        (spoiled("d", "summary.json", b'{"schema_version": 2}'), "schema version 1"),
        (spoiled("e", "records.jsonl", b""), "is empty"),
        (spoiled("f", "records.jsonl", good[:-20]), "torn line"),
        (spoiled("g", "records.jsonl", b'{"id": 1}\n'), "records.jsonl:1: id"),
        (spoiled("h", "records.jsonl", b"\x00\xff\n" + good), "records.jsonl:1"),
        (spoiled("i", "records.jsonl", good), "summary.json"),
    ):
        result = invoke(source, "-o", out)
        assert result.exit_code == 2, source
        assert problem in result.stderr
        assert result.stderr.count("\n") == 1
        assert not out.parent.exists()


def test_what_cannot_be_written_is_3_and_leaves_what_was_there(run: Path, tmp_path: Path) -> None:
    output, directory = tmp_path / "r.html", tmp_path / "taken.md"
    output.write_text("earlier")
    directory.mkdir()
    before = left_in(tmp_path)
    result = invoke(run, "-o", output, "--markdown", directory)
    assert result.exit_code == 3
    assert "cannot write" in result.stderr
    assert output.read_text() == "earlier"
    assert left_in(tmp_path) == before
    (tmp_path / "taken.html").mkdir()
    assert invoke(run, "-o", tmp_path / "taken.html").exit_code == 3
    (tmp_path / "file").write_text("x")
    assert invoke(run, "-o", tmp_path / "file" / "r.html").exit_code == 3
    assert not [name for name in left_in(tmp_path) if name.endswith(".tmp")]


def test_ten_thousand_cases_stay_one_page_of_a_few_megabytes(tmp_path: Path) -> None:
    verdicts = ("allow", "escalate", "refuse")
    right = [(verdicts[i % 3], verdicts[i % 3]) for i in range(10_000)]
    some_wrong = [(v, "allow" if i % 50 == 0 else v) for i, (v, _) in enumerate(right)]
    big = write_run(
        tmp_path / "big", make_records(right), make_records(some_wrong, backend="llamacpp")
    )
    result = invoke(big, "-o", tmp_path / "r.html")
    assert result.exit_code == 0, result.stderr
    text = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert len(text) < 4_000_000
    assert text.count("<tr") < 1_000
    rows = case_data(parse_html(text))["cases"]
    assert [row[6] for row in rows].count("fuw") == sum(v == "refuse" for v, _ in right[::50])
    assert len(rows) == 10_000

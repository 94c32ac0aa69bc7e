import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.case_files import case_dict, write_cases

from so8t_eval.cli import main

WORDS = [
    "harbour",
    "lantern",
    "violin",
    "gravel",
    "orchard",
    "teapot",
    "compass",
    "blanket",
    "saddle",
    "thimble",
]


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["lint", *map(str, arguments)], prog_name="so8t-eval")


def cases(first: int = 0, **changes: object) -> list[dict[str, object]]:
    """Six clean cases that resemble nothing of another ``first``."""
    return [
        case_dict(number, prompt=" ".join(f"{WORDS[(first + number * k) % 10]}{first * k}"
                                          for k in range(1, 8)), **changes)
        for number in range(first, first + 6)
    ]  # fmt: skip


def test_clean_files_are_0_and_show_counts(tmp_path: Path) -> None:
    result = invoke(
        write_cases(tmp_path / "a.jsonl", cases(10)), write_cases(tmp_path / "b.jsonl", cases(20))
    )
    assert result.exit_code == 0, result.stdout
    assert result.stdout.splitlines()[-1] == "0 errors, 0 warnings"
    assert "a.jsonl: 6 cases" in result.stdout
    for name in ("allow", "escalate", "refuse", "median", "esc/advice 2", "tags: none"):
        assert name in result.stdout


def test_warnings_alone_are_0(tmp_path: Path) -> None:
    path = write_cases(tmp_path / "a.jsonl", cases(10, category="mine/own"))
    result = invoke(path)
    assert result.exit_code == 0
    assert f"{path}:1: warning [unknown-category] case-0010: category 'mine/own'" in result.stdout
    assert "0 errors, 6 warnings" in result.stdout


def test_every_broken_line_is_2_and_named(tmp_path: Path) -> None:
    broken = [case_dict(1, verdict="deny"), case_dict(2), case_dict(3, lang=None)]
    path = write_cases(tmp_path / "a.jsonl", broken)
    result = invoke(path)
    assert result.exit_code == 2
    assert f"{path}:1: error [schema] verdict:" in result.stdout
    assert f"{path}:3: error [schema] lang: missing; this field is required" in result.stdout
    assert "2 errors" in result.stdout


def test_missing_file_is_2(tmp_path: Path) -> None:
    result = invoke(tmp_path / "none.jsonl")
    assert result.exit_code == 2
    assert "no such file" in result.stdout


def test_near_duplicate_of_another_file_and_of_a_reference_is_2(tmp_path: Path) -> None:
    first = write_cases(tmp_path / "a.jsonl", cases(10))
    second = write_cases(tmp_path / "b.jsonl", [case_dict(99, prompt=cases(10)[2]["prompt"])])
    public = tmp_path / "public.jsonl"
    public.write_text(json.dumps({"prompt": cases(10)[0]["prompt"], "source": "x"}) + "\n")
    assert invoke(first).exit_code == invoke(second).exit_code == 0
    across = invoke(first, second)
    assert across.exit_code == 2
    assert f"{second}:1: error [near-duplicate] case-0099: 1.00 similar to" in across.stdout
    against = invoke(first, "--against", public)
    assert against.exit_code == 2
    assert f"{first}:1: error [near-duplicate]" in against.stdout
    assert f"1.00 similar to {public}:1; rewrite or remove one" in against.stdout


def test_json_holds_counts_and_findings(tmp_path: Path) -> None:
    path = write_cases(tmp_path / "a.jsonl", cases(10, category="ok/code"))
    result = invoke(path, "--json")
    assert result.exit_code == 2
    facts = json.loads(result.stdout)
    assert (facts["errors"], facts["warnings"]) == (4, 0)
    assert facts["files"][0]["n"] == 6
    assert facts["files"][0]["categories"] == {"ok/code": 6}
    assert {f["rule"] for f in facts["findings"]} == {"verdict-category"}


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        ([], "CASES"),
        (["{a}", "{a}"], "given twice"),
        (["{a}", "--against", "{a}"], "given twice"),
        (["{a}", "--against", "{dir}/none.jsonl"], "none.jsonl: cannot be read"),
    ],
)
def test_wrong_arguments_are_2(tmp_path: Path, arguments: list[str], problem: str) -> None:
    path = write_cases(tmp_path / "a.jsonl", cases(10))
    result = invoke(*(word.format(a=path, dir=tmp_path) for word in arguments))
    assert result.exit_code == 2
    assert problem in result.stderr


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    path = write_cases(tmp_path / "a.jsonl", cases(10, category="x\x1b[31m"))
    assert "\x1b" not in invoke(path).stdout

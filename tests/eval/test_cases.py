"""Case files: what loads, and how each problem is named."""

import json
from pathlib import Path

import pytest
from support.case_files import case_dict, write_cases

from so8t_eval.cases import Case, load_cases, parse_messages
from so8t_eval.errors import CaseFileError, UsageError


def line(**changes: object) -> bytes:
    return json.dumps(case_dict(0, **changes)).encode()


@pytest.mark.parametrize(
    ("content", "where", "problem"),
    [
        (line() + b"\n{broken", ":2:", "not valid JSON"),
        (b"[1]", ":1:", "expected a JSON object, found list"),
        (line() + b"\n\n" + line(), ":3: id:", "first used on line 1"),
        (line(verdict="maybe"), ":1: verdict:", "'allow', 'escalate' or 'refuse'"),
        (line(verdict=None), ":1: verdict:", "missing"),
        (line(colour="red"), ":1: colour:", "unknown field"),
        (line(prompt=None), ":1:", "exactly one of 'prompt' and 'messages'"),
        (line(messages=[{"role": "user", "content": "x"}]), ":1:", "exactly one of"),
        (line(prompt=" \n"), ":1:", "empty"),
        (b"", "", "no cases"),
        (line() + b"\n\xff\xfe", ":2:", "not UTF-8 (byte 0xff at column 1)"),
        (line(prompt="a\ud800b"), ":1: prompt:", "lone surrogate U+D800 at character 1"),
        (
            line(prompt=None, messages=[{"role": "assistant", "content": "x"}]),
            ":1:",
            "the user's",
        ),
    ],
)
def test_problem_is_named_with_file_line_and_field(
    tmp_path: Path, content: bytes, where: str, problem: str
) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(content)
    with pytest.raises(CaseFileError) as caught:
        load_cases(path)
    assert f"{path}{where}" in str(caught.value)
    assert problem in str(caught.value)
    assert caught.value.exit_code == 2


def test_missing_file_is_a_case_file_error(tmp_path: Path) -> None:
    with pytest.raises(CaseFileError, match="no such file"):
        load_cases(tmp_path / "none.jsonl")


def test_nul_byte_order_mark_and_blank_lines_load(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(b"\xef\xbb\xbf\n" + line(prompt="a\0b") + b"\r\n\n")
    (case,) = load_cases(path)
    assert case.conversation[0].content == "a\0b"


def test_content_hash_ignores_id_and_label_but_not_policy_or_text(tmp_path: Path) -> None:
    same = {"prompt": "same text"}
    path = write_cases(
        tmp_path / "cases.jsonl",
        [
            case_dict(0, **same),
            case_dict(1, **same),
            case_dict(2, **same, policy="p"),
            case_dict(3, prompt="other"),
            case_dict(4, prompt=None, messages=[{"role": "user", "content": "same text"}]),
        ],
    )
    a, b, with_policy, other, as_messages = (case.content_hash for case in load_cases(path))
    assert a == b == as_messages
    assert len({a, with_policy, other}) == 3


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ({}, "expected a list"),
        ([], "at least one message"),
        ([{"role": "user"}], "0?.?content: missing"),
        ([{"role": "tool", "content": "x"}], "role"),
        ([{"role": "user", "content": "\ud800"}], "lone surrogate"),
        (
            [{"role": "user", "content": "x"}, {"role": "system", "content": "y"}],
            "the user's",
        ),
    ],
)
def test_messages_that_cannot_be_judged_are_usage_errors(value: object, problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        parse_messages(value, "messages.json")


def test_case_is_frozen(tmp_path: Path) -> None:
    case = Case.model_validate(case_dict(0))
    with pytest.raises(ValueError, match="frozen"):
        case.id = "other"  # type: ignore[misc]

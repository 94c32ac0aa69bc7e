import json
from pathlib import Path

from so8t_eval.case_lookup import cases_by_hash
from so8t_eval.cases import load_cases


def case_line(number: int, prompt: str | None = None) -> str:
    return json.dumps(
        {
            "id": f"c{number}",
            "prompt": prompt or f"request {number} é",
            "verdict": "allow",
            "category": "ok/x",
            "lang": "en",
        },
        ensure_ascii=False,
    )


def write(path: Path, *lines: str) -> Path:
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_every_case_is_found_on_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "cases.jsonl", case_line(1), "", case_line(2), case_line(3))
    found = cases_by_hash(path)
    cases = load_cases(path)
    assert len(found) == 3
    assert [found[case.content_hash].case for case in cases] == cases
    assert [found[case.content_hash].line for case in cases] == [1, 3, 4]
    assert list(found) == [case.content_hash for case in cases]
    assert found.get("f" * 64) is None


def test_of_equal_contents_the_last_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "cases.jsonl", case_line(1, "same"), case_line(2, "same"))
    found = cases_by_hash(path)
    assert [(located.line, located.case.id) for located in found.values()] == [(2, "c2")]


def test_a_missing_broken_or_repeating_file_has_no_cases(tmp_path: Path) -> None:
    assert not cases_by_hash(tmp_path / "none.jsonl")
    assert not cases_by_hash(tmp_path)
    assert not cases_by_hash(write(tmp_path / "broken.jsonl", case_line(1), "{"))
    assert not cases_by_hash(write(tmp_path / "twice.jsonl", case_line(1), case_line(1, "other")))
    assert not cases_by_hash(write(tmp_path / "empty.jsonl"))


def test_a_case_that_was_changed_meanwhile_is_unknown(tmp_path: Path) -> None:
    path = write(tmp_path / "cases.jsonl", case_line(1), case_line(2))
    found = cases_by_hash(path)
    first, second = (case.content_hash for case in load_cases(path))
    write(path, case_line(1), case_line(2, "request 2 !"))
    assert found.get(first) is not None
    assert found.get(second) is None
    path.unlink()
    assert found.get(first) is None

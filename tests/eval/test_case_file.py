"""Case files read again from disk: the same cases and the same problems as when they are loaded."""

import json
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.case_files import case_dict, write_cases

from so8t_eval.case_file import open_cases
from so8t_eval.case_sampling import stratified_sample
from so8t_eval.cases import load_cases
from so8t_eval.errors import CaseFileError
from so8t_eval.id_digests import IdDigests


def line(number: int = 0, **changes: object) -> bytes:
    return json.dumps(case_dict(number, **changes), ensure_ascii=False).encode()


def test_cases_are_those_that_loading_gives(tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    mark = b"\xef\xbb\xbf"
    path.write_bytes(mark + b"\n".join([line(0), b" ", line(1, prompt="事例"), line(2) + b"\r"]))
    cases, loaded = open_cases(path), load_cases(path)
    assert len(loaded) == 3
    assert list(cases) == list(cases) == [cases[i] for i in range(3)] == loaded
    assert cases[1:] == loaded[1:]
    assert cases[-1] == loaded[-1]


@pytest.mark.parametrize("n", [1, 7, 29, 30, 31])
def test_the_sample_is_the_one_of_loaded_cases(tmp_path: Path, n: int) -> None:
    path = write_cases(tmp_path / "cases.jsonl", [case_dict(i) for i in range(30)])
    assert list(open_cases(path, n, 5)) == stratified_sample(load_cases(path), n, 5)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        line() + b"\n{broken",
        line() + b"\n\n" + line() + b"\n" + line(1) + b"\n" + line(1),
        line() + b"\n" + line() + b"\n{broken",
        line() + b"\n{broken\n" + line(),
        line() + b"\n\xff\xfe",
        line(verdict="maybe"),
        b'{"id": "a"\n',
    ],
)
def test_problems_are_those_that_loading_names(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(content)
    messages = []
    for read in (load_cases, open_cases):
        with pytest.raises(CaseFileError) as caught:
            read(path)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CaseFileError, match="no such file"):
        open_cases(tmp_path / "none.jsonl")


def test_a_file_changed_meanwhile_is_noticed(tmp_path: Path) -> None:
    path = write_cases(tmp_path / "cases.jsonl", [case_dict(i) for i in range(3)])
    cases = open_cases(path)
    path.write_bytes(b"# a new first line\n" + path.read_bytes())
    with pytest.raises(CaseFileError, match="was changed while it was being judged"):
        list(cases)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no named pipes in directories")
def test_a_pipe_is_read_once(tmp_path: Path) -> None:
    content = write_cases(tmp_path / "cases.jsonl", [case_dict(i) for i in range(4)]).read_bytes()
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=pipe.write_bytes, args=(content,))
    writer.start()
    cases = open_cases(pipe, 2)
    writer.join()
    assert list(cases) == list(open_cases(tmp_path / "cases.jsonl", 2))


@given(st.lists(st.text(max_size=1), max_size=12))
def test_the_first_repeat_is_found(texts: list[str]) -> None:
    digests = IdDigests()
    for text in texts:
        digests.add(text)
    expected = next(
        ((i, texts.index(text)) for i, text in enumerate(texts) if text in texts[:i]), None
    )
    assert digests.first_repeat() == expected

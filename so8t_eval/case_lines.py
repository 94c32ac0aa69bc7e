"""Case files with their line numbers: for findings that point at a line, and looking up texts."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from pydantic import ValidationError

from so8t_eval.cases import Case, describe, json_problem, load_cases
from so8t_eval.errors import CaseFileError


class LocatedCase(NamedTuple):
    """A case and the line of its file it stands on, counted from 1."""

    line: int
    case: Case


class LocatedText(NamedTuple):
    """A text of any JSONL file and the line it stands on, counted from 1."""

    line: int
    text: str


class ReadCases(NamedTuple):
    """The cases of a file in file order, or, when ``problems`` is not empty, why there are none."""

    cases: tuple[LocatedCase, ...]
    problems: tuple[CaseFileError, ...]


def read_located_cases(path: Path | str) -> ReadCases:
    """Read a case file as ``load_cases`` does, but go on after a broken line to find them all."""
    source = Path(path)
    try:
        cases = load_cases(source)
    except CaseFileError as first:
        return ReadCases((), (first, *_later_problems(source, first.line)))
    return ReadCases(tuple(map(LocatedCase, _filled_lines(source), cases)), ())


def read_reference_texts(path: Path | str) -> list[LocatedText]:
    """Read the texts of a JSONL file whose objects have a ``prompt``, ``messages`` or ``text``.

    Other fields are not looked at, so public data sets need no conversion.

    Raises:
        CaseFileError: the file cannot be read, or a line is not such an object.
    """
    source = Path(path)
    texts: list[LocatedText] = []
    for number, line in _numbered_lines(source):
        try:
            text = _text_of(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise CaseFileError(source, number, None, json_problem(error)) from error
        if text is None:
            raise CaseFileError(
                source, number, None, "expected an object with a 'prompt', 'messages' or 'text'"
            )
        texts.append(LocatedText(number, text))
    return texts


def _filled_lines(source: Path) -> Iterator[int]:
    lines = source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return (number for number, line in enumerate(lines, start=1) if line.strip())


def _numbered_lines(source: Path) -> Iterator[tuple[int, str]]:
    try:
        lines = source.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise CaseFileError(source, None, None, problem) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                yield number, line.decode("utf-8")
            except UnicodeDecodeError as error:
                problem = "not UTF-8; save the file as UTF-8"
                raise CaseFileError(source, number, None, problem) from error


def _text_of(value: object) -> str | None:
    if not isinstance(value, dict):
        return None
    for key in ("prompt", "text"):
        if isinstance(value.get(key), str):
            return str(value[key])
    messages = value.get("messages")
    if not isinstance(messages, list):
        return None
    return "\n".join(str(turn.get("content", "")) for turn in messages if isinstance(turn, dict))


def _later_problems(source: Path, first_line: int | None) -> list[CaseFileError]:
    """The problems after the first one, one per line; none when the file as a whole is wrong."""
    if first_line is None:
        return []
    problems: list[CaseFileError] = []
    seen: dict[str, int] = {}
    try:
        for number, line in _numbered_lines(source):
            problem = _problem(source, number, line, seen)
            if problem is not None and number > first_line:
                problems.append(problem)
    except CaseFileError as error:  # a line that is no text: what follows it cannot be trusted
        if error.line is not None and error.line > first_line:
            problems.append(error)
    return problems


def _problem(source: Path, number: int, line: str, seen: dict[str, int]) -> CaseFileError | None:
    try:
        case = Case.model_validate(json.loads(line))
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or None
        text = describe(first["type"], first["msg"], first["input"])
        return CaseFileError(source, number, field, text)
    except (ValueError, RecursionError) as error:
        return CaseFileError(source, number, None, json_problem(error))
    if case.id in seen:
        problem = f"duplicate id {case.id!r}, first used on line {seen[case.id]}"
        return CaseFileError(source, number, "id", problem)
    seen[case.id] = number
    return None

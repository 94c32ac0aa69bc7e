"""Read the rows of other projects' CSV and JSONL files, gzip or plain, with their line numbers."""

import contextlib
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, NamedTuple

from so8t_eval.cases import json_problem
from so8t_eval.errors import CaseFileError

Container = Literal["csv", "jsonl"]

_LONGEST_FIELD: Final = 2**31 - 1
_UNDECODABLE: Final = re.compile("[\udc80-\udcff]")
"""What a byte that is not UTF-8 becomes under ``surrogateescape``."""

_OTHER_FORMATS: Final = {
    b"PAR1": "a Parquet file; export it as CSV or JSONL",
    b"PK\x03\x04": "a zip archive or spreadsheet; unpack it, or export it as CSV",
    b"\xff\xfe": "UTF-16 text; save it as UTF-8",
    b"\xfe\xff": "UTF-16 text; save it as UTF-8",
}


@dataclass(frozen=True)
class Row:
    """One row. ``line`` is the first it stands on, from 1; column names are matched in any case.

    ``nested`` names the columns whose values are lists or objects and so no text.
    """

    path: Path
    line: int
    fields: dict[str, str]
    nested: frozenset[str] = frozenset()

    def has(self, column: str) -> bool:
        """Whether the row has this column, if only with an empty value."""
        return folded(column) in self.fields or folded(column) in self.nested

    def text(self, column: str) -> str:
        """Return a value as it stands; empty where a JSON value is null.

        Raises:
            CaseFileError: the row has no such column, or a list or object in it.
        """
        if folded(column) in self.nested:
            raise self.problem(column, "expected text, found a list or an object")
        if folded(column) not in self.fields:
            found = ", ".join(self.fields) or "none"
            raise self.problem(column, f"missing; found the columns {found}")
        return self.fields[folded(column)]

    def optional(self, column: str) -> str:
        """Return a value without white space around it, empty where there is no such column."""
        return self.text(column).strip() if self.has(column) else ""

    def problem(self, column: str | None, text: str) -> CaseFileError:
        """Return an error that names this row and column."""
        return CaseFileError(self.path, self.line, column, text)


class ReadRows(NamedTuple):
    """The readable rows of a file in order, each with its number from 1, and what was wrong.

    ``columns`` are those of the CSV header, None for JSONL, where every row names its own. A row
    that cannot be read is a problem, but keeps its number.
    """

    columns: tuple[str, ...] | None
    rows: tuple[tuple[int, Row], ...]
    problems: tuple[CaseFileError, ...]
    n: int


def folded(column: str) -> str:
    """Return a column name as names are compared."""
    return column.strip().casefold()


def read_rows(path: Path, container: Container) -> ReadRows:
    """Read a file. ``container`` counts unless the name ends in .csv or .jsonl (before any .gz).

    Blank lines are no rows. CSV is read as RFC 4180 says, with newlines in quoted fields, and a
    malformed quote is a problem rather than a guess.

    Raises:
        CaseFileError: the file cannot be read, is of another kind, or has no rows or header.
    """
    text = _decode(path, _read_bytes(path))
    kind = _named_container(path) or container
    return _csv_rows(path, text) if kind == "csv" else _jsonl_rows(path, text)


def _named_container(path: Path) -> Container | None:
    name = path.name.casefold().removesuffix(".gz")
    if name.endswith(".csv"):
        return "csv"
    return "jsonl" if name.endswith((".jsonl", ".ndjson")) else None


def _read_bytes(path: Path) -> bytes:
    try:
        raw = path.read_bytes()
        return gzip.decompress(raw) if raw.startswith(b"\x1f\x8b") else raw
    except FileNotFoundError as error:
        raise CaseFileError(path, None, None, "no such file; check the path") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        problem = f"broken gzip data ({error}); download the file again"
        raise CaseFileError(path, None, None, problem) from error
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}"
        raise CaseFileError(path, None, None, problem) from error


def _decode(path: Path, raw: bytes) -> str:
    for mark, what in _OTHER_FORMATS.items():
        if raw.startswith(mark):
            raise CaseFileError(path, None, None, f"expected CSV or JSONL, found {what}")
    return raw.decode("utf-8-sig", "surrogateescape")


def _csv_rows(path: Path, text: str) -> ReadRows:
    with _long_fields():
        lines = list(_csv_lines(path, text))
    header_line, header = next(iter(lines), (1, []))
    if isinstance(header, CaseFileError):
        raise header
    if not header:
        raise CaseFileError(path, None, None, "empty; expected a header line and rows")
    names = [folded(name) for name in header]
    twice = next((name for name in names if name and names.count(name) > 1), None)
    if twice is not None:
        raise CaseFileError(path, header_line, twice, "two columns have this name; rename one")

    def read(line: int, cells: list[str]) -> Row:
        if len(cells) != len(header):
            problem = f"expected {len(header)} fields, as in the header, found {len(cells)}"
            raise CaseFileError(path, line, None, problem)
        for name, cell in zip(header, cells, strict=True):
            _check_decoded(path, line, name, cell)
        return Row(path, line, dict(zip(names, cells, strict=True)))

    return _collect(path, tuple(name.strip() for name in header), lines[1:], read)


def _csv_lines(path: Path, text: str) -> Iterator[tuple[int, list[str] | CaseFileError]]:
    """Yield the cells of each row with the line it starts on, or why it has none."""
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            unclosed = "unexpected end" in str(error)
            reason = "a quoted field that opens here is never closed" if unclosed else str(error)
            yield line, CaseFileError(path, line, None, f"not valid CSV: {reason}")
            continue
        if cells:
            yield line, cells


@contextlib.contextmanager
def _long_fields() -> Iterator[None]:
    """Let fields be as long as the file has them; the limit is the whole process's."""
    before = csv.field_size_limit(_LONGEST_FIELD)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _jsonl_rows(path: Path, text: str) -> ReadRows:
    def read(line: int, source: str) -> Row:
        _check_decoded(path, line, None, source)
        try:
            value = json.loads(source)
        except (ValueError, RecursionError) as error:
            raise CaseFileError(path, line, None, json_problem(error)) from error
        if not isinstance(value, dict):
            problem = f"expected a JSON object, found {type(value).__name__}"
            raise CaseFileError(path, line, None, problem)
        nested = frozenset(folded(k) for k, v in value.items() if isinstance(v, (dict, list)))
        fields = {folded(k): _as_text(v) for k, v in value.items() if folded(k) not in nested}
        return Row(path, line, fields, nested)

    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return _collect(path, None, lines, read)


def _as_text(value: object) -> str:
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value)


def _collect(
    path: Path,
    columns: tuple[str, ...] | None,
    lines: Sequence[tuple[int, object]],
    read: Callable[..., Row],
) -> ReadRows:
    if not lines:
        raise CaseFileError(path, None, None, "no rows; expected at least one")
    rows: list[tuple[int, Row]] = []
    problems: list[CaseFileError] = []
    for number, (line, source) in enumerate(lines, start=1):
        try:
            if isinstance(source, CaseFileError):
                raise source
            rows.append((number, read(line, source)))
        except CaseFileError as error:
            problems.append(error)
    return ReadRows(columns, tuple(rows), tuple(problems), len(lines))


def _check_decoded(path: Path, line: int, column: str | None, text: str) -> None:
    found = _UNDECODABLE.search(text)
    if found:
        problem = f"byte 0x{ord(found[0]) - 0xDC00:02x} is not UTF-8; save the file as UTF-8"
        raise CaseFileError(path, line, column, problem)

"""Records: one backend's outcome on one case, and the JSON Lines file of a run's records."""

import os
import re
from array import array
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Annotated, BinaryIO, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from so8t_eval.atomic_write import atomic_path
from so8t_eval.cases import describe
from so8t_eval.errors import CaseFileError, DiskError, UsageError
from so8t_eval.labels import INVALID, SEVERITY_ORDER, Verdict
from so8t_eval.line_sequence import LineSequence, byte_lines

_PROBABILITY_SUM_TOLERANCE = 1e-3
"""Room for half-precision runtimes; a wrong normalisation is off by far more."""

_REPEATED_FIELDS = ("backend", "model_sha256", "protocol_hash", "runtime_hash", "category", "lang")

_FROZEN = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class RecordFileError(CaseFileError):
    """A records file is wrong, named as ``path:line: field: problem``."""


class VerdictScores(BaseModel):
    """One number per verdict: probabilities (0 to 1) or logits."""

    model_config = _FROZEN

    allow: float
    escalate: float
    refuse: float

    @classmethod
    def from_severity_order(cls, scores: tuple[float, float, float]) -> "VerdictScores":
        """Build from (allow, escalate, refuse), the order of every verdict array."""
        allow, escalate, refuse = scores
        return cls(allow=float(allow), escalate=float(escalate), refuse=float(refuse))

    def in_severity_order(self) -> tuple[float, float, float]:
        """Return (allow, escalate, refuse)."""
        return self.allow, self.escalate, self.refuse

    def top(self) -> Verdict:
        """Return the verdict with the highest score, the more severe one on a tie."""
        return max(SEVERITY_ORDER, key=lambda v: (self.in_severity_order()[v.severity], v.severity))

    def margin(self) -> float:
        """Return the highest score minus the second highest."""
        _, second, top = sorted(self.in_severity_order())
        return top - second


class Record(BaseModel):
    """One backend's outcome on one case.

    ``latency_ms`` is the single-stream time from ids in hand to verdict in hand, None where it was
    not measured (batched throughput runs, errors). ``runtime_hash`` covers the runtime's version
    and the settings that can move a logit (``BackendInfo.runtime_hash``).
    ``windows`` counts the overlapping pieces a prompt longer than the context was judged in.
    """

    model_config = _FROZEN

    id: Annotated[str, Field(min_length=1)]
    content_hash: str
    backend: str
    model_sha256: str
    protocol_hash: str
    runtime_hash: str = ""
    expected: Verdict
    verdict: Verdict | Literal["invalid"]
    probabilities: VerdictScores | None = None
    logits: VerdictScores | None = None
    latency_ms: Annotated[float, Field(ge=0)] | None = None
    n_tokens: Annotated[int, Field(ge=0)] | None = None
    windows: Annotated[int, Field(ge=1)] = 1
    error: str | None = None
    category: str
    lang: str
    tags: tuple[str, ...] = ()

    @property
    def is_valid(self) -> bool:
        """Whether the case got a verdict."""
        return self.verdict != INVALID

    @field_validator("error")
    @classmethod
    def _error_is_writable(cls, value: str | None) -> str | None:
        # A runtime's message may hold lone surrogates; the failure must be recorded all the same.
        return value and value.encode("utf-8", "backslashreplace").decode("utf-8")

    @model_validator(mode="after")
    def _check_outcome(self) -> "Record":
        if self.error is not None and self.is_valid:
            raise ValueError(f"a record with an error must be {INVALID!r}, found {self.verdict!r}")
        if self.probabilities is not None:
            shares = self.probabilities.in_severity_order()
            if min(shares) < 0 or abs(sum(shares) - 1) > _PROBABILITY_SUM_TOLERANCE:
                raise ValueError(f"probabilities must be >= 0 and sum to 1, found {shares}")
        return self


class ReadRecords(NamedTuple):
    """The records of a file, and whether a torn last line (a crash mid-append) was left out."""

    records: list[Record]
    torn: bool


def record_line(record: Record) -> bytes:
    """Return a record's line in a records file, with its line end."""
    return record.model_dump_json().encode("utf-8") + b"\n"


def append_record(stream: BinaryIO, record: Record) -> int:
    """Append one JSON line, wait until it is on disk, and return its length in bytes.

    Raises:
        DiskError: the line could not be written; the file may now end in a torn line.
    """
    line = record_line(record)
    try:
        stream.write(line)
        stream.flush()
        os.fsync(stream.fileno())
    except OSError as error:
        name = getattr(stream, "name", "records")
        raise DiskError(f"cannot append to {name}: {error.strerror or error}") from error
    return len(line)


def read_records(path: Path | str) -> ReadRecords:
    """Read a records file into memory, leaving out a last line that a crash cut short.

    Only a line without its line end can be torn, since the line end is written last.

    Raises:
        RecordFileError: the file cannot be read, or a line is not a record (named by file, line and
            field).
    """
    shared = _SharedParts()
    read = [record and shared.of(record) for _, record in _scanned(path)]
    torn = bool(read) and read[-1] is None
    return ReadRecords([record for record in read if record is not None], torn)


class _SharedParts:
    """Lets many records hold one object for what is the same in all: half the memory of a run.

    Pydantic gives every object a set of its own with the names of the fields that were given. The
    models are frozen, so nobody changes a shared one.
    """

    def __init__(self) -> None:
        self._names: dict[frozenset[str], set[str]] = {}
        self._texts: dict[str, str] = {}

    def of(self, record: Record) -> Record:
        """Return the record itself, its repeated parts replaced by equal ones seen before."""
        values = record.__dict__
        for field in _REPEATED_FIELDS:
            values[field] = self._texts.setdefault(values[field], values[field])
        for model in (record, record.probabilities, record.logits):
            if model is not None:
                given = model.model_fields_set
                names = self._names.setdefault(frozenset(given), given)
                object.__setattr__(model, "__pydantic_fields_set__", names)
        return record


class IndexedRecords(NamedTuple):
    """The records of a file, read again when asked for, and where a torn last line begins."""

    records: LineSequence[Record]
    torn_at: int | None


def index_records(path: Path | str) -> IndexedRecords:
    """Check a records file as ``read_records`` does, without keeping the records.

    Raises:
        RecordFileError: as ``read_records``.
    """
    offsets = array("q")
    torn_at = None
    for offset, record in _scanned(path):
        if record is None:
            torn_at = offset
        else:
            offsets.append(offset)
    return IndexedRecords(records_at(path, offsets), torn_at)


def records_at(path: Path | str, offsets: Iterable[int]) -> LineSequence[Record]:
    """Return the records that begin at these bytes of a records file."""
    return LineSequence(Path(path), offsets, Record.model_validate_json)


def write_records(path: Path | str, runs: Iterable[Iterable[Record]]) -> list[LineSequence[Record]]:
    """Write runs one after the other into a new records file; return where each is now.

    The runs may be read from the file that this one replaces.

    Raises:
        DiskError: the file could not be written; an earlier one is as it was.
    """
    offsets_by_run: list[array[int]] = []
    with atomic_path(path) as temporary, temporary.open("wb") as stream:
        for records in runs:
            offsets = array("q")
            for record in records:
                offsets.append(stream.tell())
                stream.write(record_line(record))
            offsets_by_run.append(offsets)
    return [records_at(path, offsets) for offsets in offsets_by_run]


def _scanned(path: Path | str) -> Iterator[tuple[int, Record | None]]:
    """Yield each record and the byte it begins at, None for a torn last line."""
    try:
        with Path(path).open("rb") as stream:
            for number, (offset, line) in enumerate(byte_lines(stream), start=1):
                if not line.strip():
                    continue
                try:
                    yield offset, Record.model_validate_json(line)
                except ValidationError as error:
                    if line.endswith(b"\n"):
                        raise _record_error(path, number, error) from error
                    yield offset, None
    except OSError as error:
        problem = f"cannot read records: {error.strerror or error}"
        raise RecordFileError(path, None, None, problem) from error


def holds_records(path: Path) -> bool:
    """Return whether a records file is there and not empty."""
    return path.exists() and path.stat().st_size > 0


def refuse_earlier_records(path: Path) -> None:
    """Raise UsageError if the file holds something already."""
    if holds_records(path):
        raise UsageError(
            f"{path}: expected a new file, found earlier records; resume that run with --resume, "
            "or choose another output directory"
        )


class RecordWriter:
    """Context manager that appends records to a file, each safe on disk before the next.

    With ``resume`` the records already there are ``existing`` (so the caller can skip their cases)
    and a torn last line is cut off before the first append.

    Raises, on entering:
        UsageError: the file already holds something and ``resume`` is false.
        RecordFileError: ``resume`` is true and the file is broken.
        DiskError: the file cannot be opened.
    """

    def __init__(self, path: Path | str, *, resume: bool = False) -> None:
        self.path = Path(path)
        self.resume = resume
        self.existing = records_at(self.path, ())
        self.was_torn = False
        self._stream: BinaryIO | None = None
        self._end = 0

    def __enter__(self) -> "RecordWriter":
        try:
            if not self.resume:
                refuse_earlier_records(self.path)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if holds_records(self.path):
                self._keep_existing()
            self._stream = self.path.open("ab")
            self._end = self._stream.tell()
        except OSError as error:
            raise DiskError(f"cannot write {self.path}: {error.strerror or error}") from error
        return self

    def append(self, record: Record) -> int:
        """Append one record (see ``append_record``) and return the byte it begins at."""
        if self._stream is None:
            raise ValueError(f"{self.path} is not open; use RecordWriter in a with statement")
        begin = self._end
        self._end += append_record(self._stream, record)
        return begin

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        stream, self._stream = self._stream, None
        try:
            if stream is not None:
                stream.close()
        except OSError as error:
            if exc is None:
                raise DiskError(f"cannot write {self.path}: {error.strerror or error}") from error

    def _keep_existing(self) -> None:
        self.existing, torn_at = index_records(self.path)
        self.was_torn = torn_at is not None
        with self.path.open("rb+") as stream:
            stream.seek(-1, os.SEEK_END)
            if torn_at is not None:
                stream.truncate(torn_at)
            elif stream.read() != b"\n":
                stream.write(b"\n")
            os.fsync(stream.fileno())


def _record_error(path: Path | str, line: int, error: ValidationError) -> RecordFileError:
    first = error.errors(include_url=False)[0]
    field = ".".join(str(part) for part in first["loc"]) or None
    problem = describe(first["type"], first["msg"], first["input"])
    if first["type"] == "json_invalid":  # whose input is the whole line
        reason = first["msg"].removeprefix("Invalid JSON: ")
        problem = "not valid JSON: " + re.sub(r" at line \d+ column \d+$", "", reason)
    elif field is not None and field.startswith("verdict."):
        names = ", ".join([*(verdict.value for verdict in SEVERITY_ORDER), INVALID])
        field, problem = "verdict", f"expected {names}, found {first['input']!r}"
    hint = "restore the file, or run again in another directory"
    return RecordFileError(path, line, field, f"{problem}; {hint}")

"""Load labelled cases from JSONL; every problem is named by file, line and field."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    field_validator,
    model_validator,
)

from so8t_eval.errors import CaseFileError, UsageError
from so8t_eval.labels import Verdict
from so8t_eval.line_sequence import byte_lines

NonEmpty = Annotated[str, Field(min_length=1)]


class Message(BaseModel):
    """One turn of a conversation. ``content`` is always plain text, never control tokens."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    role: Literal["system", "user", "assistant"]
    content: str

    @field_validator("content")
    @classmethod
    def _content_is_text(cls, value: str) -> str:
        return checked_text(value)


class Case(BaseModel):
    """One labelled request: exactly one of ``prompt`` and ``messages``, and the right verdict."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: NonEmpty
    prompt: str | None = None
    messages: tuple[Message, ...] | None = None
    verdict: Verdict
    category: NonEmpty
    lang: NonEmpty
    tags: tuple[str, ...] = ()
    policy: str | None = None
    reply: str | None = None
    note: str | None = None

    @field_validator("prompt", "policy", "reply")
    @classmethod
    def _is_text(cls, value: str | None) -> str | None:
        return value if value is None else checked_text(value)

    @model_validator(mode="after")
    def _one_conversation(self) -> "Case":
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("expected exactly one of 'prompt' and 'messages'")
        check_conversation(self.conversation)
        return self

    @property
    def conversation(self) -> tuple[Message, ...]:
        """The turns to judge, oldest first; the last is the user's."""
        if self.messages is not None:
            return self.messages
        return (Message(role="user", content=self.prompt or ""),)

    @property
    def text(self) -> str:
        """All turns as one string, for display and near-duplicate search."""
        return "\n".join(message.content for message in self.conversation)

    @property
    def content_hash(self) -> str:
        """SHA-256 of messages and policy, without label or id: the key that pairs runs."""
        return content_hash(self.conversation, self.policy)


def checked_text(value: str) -> str:
    """Return ``value`` if it can be encoded; raise ValueError on a lone surrogate."""
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        code = ord(value[error.start])
        raise ValueError(
            f"lone surrogate U+{code:04X} at character {error.start}: not text any tokenizer can "
            "read; replace it (for example with U+FFFD)"
        ) from error
    return value


def check_conversation(messages: tuple[Message, ...]) -> None:
    """Raise ValueError unless the turns can be judged: some text, the user's turn last."""
    if not messages:
        raise ValueError("expected at least one message, found none")
    if messages[-1].role != "user":
        raise ValueError(f"expected the last message to be the user's, found {messages[-1].role!r}")
    if not messages[-1].content.strip():
        raise ValueError("the text to judge is empty")
    if any(message.role == "system" for message in messages[1:]):
        raise ValueError("a system message is allowed only at the start")


def content_hash(messages: tuple[Message, ...], policy: str | None) -> str:
    """SHA-256 (hex) over the canonical JSON of a conversation and its system policy."""
    payload = {
        "messages": [[message.role, message.content] for message in messages],
        "policy": policy,
    }
    canonical = json.dumps(payload, ensure_ascii=True, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def load_cases(path: Path | str) -> list[Case]:
    """Read every case of a JSONL file into memory, in file order.

    Raises:
        CaseFileError: missing, empty or non-UTF-8 file; a broken line, unknown field or verdict,
            duplicate id; with the line and field.
    """
    source = Path(path)
    cases: list[Case] = []
    first_line_of: dict[str, int] = {}
    for number, _, case in read_cases(source):
        if case.id in first_line_of:
            raise duplicate_id(source, number, case.id, first_line_of[case.id])
        first_line_of[case.id] = number
        cases.append(case)
    if not cases:
        raise no_cases(source)
    return cases


class ReadCase(NamedTuple):
    """A case, the line it stands on (counted from 1) and the byte at which it begins."""

    line: int
    offset: int
    case: Case


def read_cases(source: Path) -> Iterator[ReadCase]:
    """Yield the cases of a JSONL file, one at a time; ids may repeat.

    Raises:
        CaseFileError: the file cannot be read, or a line is not a case.
    """
    try:
        with source.open("rb") as stream:
            for number, (offset, line) in enumerate(byte_lines(stream), start=1):
                if line.strip():
                    case = parse_case(source, number, line.removesuffix(b"\n"))
                    yield ReadCase(number, offset, case)
    except FileNotFoundError as error:
        raise CaseFileError(
            source, None, None, "no such file; give the path of a JSONL file"
        ) from error
    except OSError as error:
        raise CaseFileError(source, None, None, f"cannot be read: {error.strerror}") from error


def duplicate_id(source: Path, line: int, case_id: str, first_line: int) -> CaseFileError:
    """Return the error for an id that stands on two lines."""
    problem = f"duplicate id {case_id!r}, first used on line {first_line}; ids must be unique"
    return CaseFileError(source, line, "id", problem)


def no_cases(source: Path) -> CaseFileError:
    """Return the error for a file without a case."""
    return CaseFileError(source, None, None, "no cases; expected one JSON object per line")


def parse_case(source: Path, number: int | None, line: bytes) -> Case:
    """Return the case on a line of a file.

    Raises:
        CaseFileError: it is not one; with the line and field.
    """
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CaseFileError(
            source,
            number,
            None,
            f"not UTF-8 (byte 0x{line[error.start]:02x} at column "
            f"{error.start + 1}); save the file as UTF-8",
        ) from error
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CaseFileError(source, number, None, json_problem(error)) from error
    if not isinstance(value, dict):
        raise CaseFileError(
            source, number, None, f"expected a JSON object, found {type(value).__name__}"
        )
    try:
        return Case.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or None
        raise CaseFileError(
            source, number, field, describe(first["type"], first["msg"], first["input"])
        ) from error


def json_problem(error: ValueError | RecursionError) -> str:
    """Say why one line of a file is no JSON, by its column."""
    if isinstance(error, json.JSONDecodeError):
        return f"not valid JSON: {error.msg.removesuffix(' at')} at column {error.colno}"
    return f"not valid JSON: {error}"


def describe(kind: str, message: str, found: object) -> str:
    """Turn one pydantic error into a sentence of ours: expected, found, next step."""
    if kind == "missing":
        return "missing; this field is required"
    if kind == "extra_forbidden":
        return "unknown field; remove it or correct its spelling"
    text = message.removeprefix("Value error, ").replace("Input should be", "expected")
    if kind == "value_error":
        return text
    shown = json.dumps(found, ensure_ascii=True, default=str)
    return f"{text}; found {shown if len(shown) <= 80 else shown[:77] + '...'}"


def parse_messages(value: object, where: str) -> tuple[Message, ...]:
    """Validate a decoded ``[{role, content}, …]`` list, for example from ``--messages``.

    Raises:
        UsageError: the value is not such a list or cannot be judged; ``where`` names its origin.
    """
    if not isinstance(value, list):
        raise UsageError(
            f"{where}: expected a list of {{role, content}}, found {type(value).__name__}"
        )
    try:
        messages = TypeAdapter(tuple[Message, ...]).validate_python(value)
        check_conversation(messages)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        raise UsageError(
            f"{where}: {field}: {describe(first['type'], first['msg'], first['input'])}"
        ) from error
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error
    return messages

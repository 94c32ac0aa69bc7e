"""The report's case table as JSON: flips first, then errors, the most dangerous of each on top."""

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple

from so8t_eval.labels import Verdict
from so8t_eval.records import Record
from so8t_eval.summary_schema import ComparisonEntry
from so8t_eval.visible_text import visible_text

DEFAULT_TABLE_CASES: Final = 10_000
"""Cases in the table unless asked for more: a browser holds all that are there in memory."""

LONGEST_TEXT: Final = 2000
"""Characters of a prompt that are shown: ten thousand cases must stay one page."""
_ESCAPED_IN_SCRIPT: Final = "<>&\u2028\u2029"

TextOf = Callable[[Record], str | None]
"""What to show as a record's prompt; None where it is not known."""


class CaseRow(NamedTuple):
    """One case and its outcome in every run, as the page's script reads it.

    ``flags`` are letters: f flip, u unsafe allow, n no verdict, w wrong (u and n included), each if
    so in at least one run.
    """

    id: str
    text: str | None
    expected: str
    category: str
    lang: str
    tags: list[str]
    flags: str
    outcomes: list[list[str | float | None]]
    """Per run: verdict, probability of allow, escalate and refuse, margin."""


class LeftOut(NamedTuple):
    """How many cases are not in the table: flips, other wrong ones, and right ones."""

    flips: int
    wrong: int
    right: int

    @property
    def n(self) -> int:
        """All of them."""
        return sum(self)


class CaseTable(NamedTuple):
    """The rows of the case table, and what did not fit."""

    rows: list[CaseRow]
    left_out: LeftOut


def case_table(
    runs: Sequence[Sequence[Record]],
    comparison: ComparisonEntry | None,
    text_of: TextOf,
    most_cases: int = DEFAULT_TABLE_CASES,
) -> CaseTable:
    """Return a row per case, of the first ``most_cases``; runs' records are in the same order.

    Flips come first, in the order of the comparison; then unsafe allows, cases without a verdict
    and other wrong ones, the surest of each first; then the right ones.
    """
    flips = comparison.flips if comparison else []
    rank = {flip.id: place for place, flip in reversed(list(enumerate(flips)))}
    cases = sorted(zip(*runs, strict=True), key=lambda case: _order(case, rank))
    rows = [_row(case, case[0].id in rank, text_of(case[0])) for case in cases[:most_cases]]
    return CaseTable(rows, _left_out(cases[most_cases:], rank))


def _left_out(cases: Sequence[Sequence[Record]], rank: Mapping[str, int]) -> LeftOut:
    flips = sum(case[0].id in rank for case in cases)
    wrong = sum(case[0].id not in rank and "w" in _flags(case) for case in cases)
    return LeftOut(flips, wrong, len(cases) - flips - wrong)


def script_json(value: object) -> str:
    """Return JSON that is safe inside a script element: no ``<``, ``>``, ``&`` or bare U+2028."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for char in _ESCAPED_IN_SCRIPT:
        text = text.replace(char, f"\\u{ord(char):04x}")
    return text


def _order(case: Sequence[Record], rank: Mapping[str, int]) -> tuple[float, ...]:
    if case[0].id in rank:
        return 0, rank[case[0].id]
    flags = _flags(case)
    group = next((place for place, flag in enumerate("unw", start=1) if flag in flags), 4)
    surest = max((r.probabilities.margin() for r in case if r.probabilities), default=0.0)
    return group, -surest if group < 4 else 0.0


def _row(case: Sequence[Record], is_flip: bool, text: str | None) -> CaseRow:
    first = case[0]
    return CaseRow(
        id=visible_text(first.id),
        text=None if text is None else _shown(text),
        expected=first.expected.value,
        category=visible_text(first.category),
        lang=visible_text(first.lang),
        tags=[visible_text(tag) for tag in first.tags],
        flags=("f" if is_flip else "") + _flags(case),
        outcomes=[_outcome(record) for record in case],
    )


def _flags(case: Sequence[Record]) -> str:
    tests = {
        "u": any(r.verdict is Verdict.ALLOW and r.expected is Verdict.REFUSE for r in case),
        "n": any(not r.is_valid for r in case),
        "w": any(r.verdict != r.expected for r in case),
    }
    return "".join(flag for flag, holds in tests.items() if holds)


def _shown(text: str) -> str:
    if len(text) <= LONGEST_TEXT:
        return visible_text(text)
    return f"{visible_text(text[:LONGEST_TEXT])} … ({len(text) - LONGEST_TEXT} more characters)"


def _outcome(record: Record) -> list[str | float | None]:
    verdict = record.verdict.value if isinstance(record.verdict, Verdict) else record.verdict
    if record.probabilities is None:
        return [verdict, None, None, None, None]
    shares = record.probabilities.in_severity_order()
    return [verdict, *(round(x, 4) for x in (*shares, record.probabilities.margin()))]

"""The cases behind a CI gate rule that did not pass."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from so8t_eval.agreement import RecordPair
from so8t_eval.labels import Verdict
from so8t_eval.metric_differences import LOWER_IS_BETTER, event_codes
from so8t_eval.records import Record

PRECISION_OF: Final = {
    "escalate_precision": Verdict.ESCALATE,
    "allow_precision": Verdict.ALLOW,
}


@dataclass(frozen=True)
class BlamedCase:
    """A case behind a rule that did not pass. ``base_verdict`` is None without a base run."""

    id: str
    content_hash: str
    category: str
    lang: str
    expected: str
    base_verdict: str | None
    verdict: str

    def __str__(self) -> str:
        before = f"{self.base_verdict} -> " if self.base_verdict else ""
        return f"{self.id} ({self.category}): expected {self.expected}, got {before}{self.verdict}"


def wrong_cases(metric: str, records: Sequence[Record]) -> tuple[BlamedCase, ...]:
    """The cases that cost this metric: each could be right and make it better."""
    return tuple(
        blamed_case(record)
        for record, bad in zip(records, _costs(metric, records), strict=True)
        if bad
    )


def worse_cases(metric: str, pairs: Sequence[RecordPair]) -> tuple[BlamedCase, ...]:
    """The cases that cost this metric in the candidate but not in the base."""
    before = _costs(metric, [pair.a for pair in pairs])
    after = _costs(metric, [pair.b for pair in pairs])
    return tuple(
        blamed_case(pair.b, pair.a)
        for pair, was, is_ in zip(pairs, before, after, strict=True)
        if is_ and not was
    )


def _costs(metric: str, records: Sequence[Record]) -> list[bool]:
    if metric == "invalid_rate":
        return [not record.is_valid for record in records]
    if metric in PRECISION_OF:
        verdict = PRECISION_OF[metric]
        return [record.verdict == verdict != record.expected for record in records]
    codes = event_codes(metric, records)
    if codes is None:  # macro F1 and calibration: every wrong verdict
        return [record.verdict != record.expected for record in records]
    counted, event = codes
    bad = event if metric in LOWER_IS_BETTER else ~event
    return [bool(value) for value in counted & bad]


def blamed_case(record: Record, base: Record | None = None) -> BlamedCase:
    """Return a candidate's record, and the base's where there is one, as a case to point at."""
    return BlamedCase(
        id=record.id,
        content_hash=record.content_hash,
        category=record.category,
        lang=record.lang,
        expected=record.expected.value,
        base_verdict=None if base is None else _name(base),
        verdict=_name(record),
    )


def _name(record: Record) -> str:
    return record.verdict.value if isinstance(record.verdict, Verdict) else record.verdict

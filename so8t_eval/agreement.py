"""How far two runs of the same cases agree: verdicts, probabilities, and every flip."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from so8t_eval.errors import UsageError
from so8t_eval.intervals import Interval, wilson
from so8t_eval.labels import INVALID, Verdict
from so8t_eval.records import Record


class RecordPair(NamedTuple):
    """Two runs' records of the same case."""

    a: Record
    b: Record


@dataclass(frozen=True)
class Flip:
    """A case on which the second run's outcome differs from the first's.

    Margins are the top minus the second probability, None without probabilities. ``direction``
    reads like ``refuse->allow``.
    """

    id: str
    category: str
    lang: str
    expected: str
    verdict_a: str
    verdict_b: str
    margin_a: float | None
    margin_b: float | None
    direction: str


@dataclass(frozen=True)
class Agreement:
    """Agreement of two runs.

    ``agreement`` is the share of cases with the same verdict; a missing verdict agrees with
    nothing, not even with another missing one, although two missing ones are no flip. Probability
    differences are absolute, per case and verdict, over the cases with probabilities in both runs;
    None when there are none.
    """

    agreement: Interval
    max_probability_difference: float | None
    mean_probability_difference: float | None
    n_probability_pairs: int
    flips: tuple[Flip, ...]


def pair_records(a: Sequence[Record], b: Sequence[Record]) -> list[RecordPair]:
    """Pair two runs' records by case id and content hash, in the order of the first run.

    Raises:
        UsageError: an id occurs twice in a run, a case is in one run only, or its content or
            expected verdict differs; the text names the first such case.
    """
    by_id_a, by_id_b = records_by_id(a), records_by_id(b)
    for one, other, where in ((by_id_a, by_id_b, "second"), (by_id_b, by_id_a, "first")):
        missing = next((id_ for id_ in one if id_ not in other), None)
        if missing is not None:
            raise UsageError(
                f"the runs hold different cases: {missing!r} is missing from the {where} run "
                f"({len(a)} and {len(b)} records); run both on the same case file"
            )
    pairs = [RecordPair(record, by_id_b[id_]) for id_, record in by_id_a.items()]
    for pair in pairs:
        _check_same_case(pair)
    return pairs


def records_by_id(records: Sequence[Record]) -> dict[str, Record]:
    """Index one run's records by case id, in their order.

    Raises:
        UsageError: an id occurs twice.
    """
    by_id: dict[str, Record] = {}
    for record in records:
        if record.id in by_id:
            raise UsageError(f"expected one record per case, found two of {record.id!r} in one run")
        by_id[record.id] = record
    return by_id


def compare_runs(a: Sequence[Record], b: Sequence[Record]) -> Agreement:
    """Compare two runs of the same cases; the first is the reference of the flips' direction.

    Flips are in ``flip_order``.

    Raises:
        UsageError: the runs do not hold the same cases; see ``pair_records``.
    """
    pairs = pair_records(a, b)
    differences = np.abs(
        [
            np.subtract(
                pair.a.probabilities.in_severity_order(), pair.b.probabilities.in_severity_order()
            )
            for pair in pairs
            if pair.a.probabilities is not None and pair.b.probabilities is not None
        ]
    )
    flips = [_flip(pair) for pair in pairs if pair.a.verdict != pair.b.verdict]
    return Agreement(
        agreement=wilson(sum(map(same_verdict, pairs)), len(pairs)),
        max_probability_difference=float(differences.max()) if len(differences) else None,
        mean_probability_difference=float(differences.mean()) if len(differences) else None,
        n_probability_pairs=len(differences),
        flips=tuple(sorted(flips, key=flip_order)),
    )


def same_verdict(pair: RecordPair) -> bool:
    """Whether both runs gave a verdict, and the same one."""
    return pair.a.is_valid and pair.a.verdict == pair.b.verdict


def flip_order(flip: Flip) -> tuple[int, bool, str, str]:
    """Return a sort key: refuse to allow first, then by severity lost, then by id.

    A missing verdict lets nothing through, so it ranks with refuse, after the real refusals.
    """
    lost = _severity(flip.verdict_a) - _severity(flip.verdict_b)
    return -lost, INVALID in (flip.verdict_a, flip.verdict_b), flip.direction, flip.id


def _check_same_case(pair: RecordPair) -> None:
    a, b = pair
    for what, first, second in (
        ("content", a.content_hash, b.content_hash),
        ("expected verdict", a.expected.value, b.expected.value),
    ):
        if first != second:
            raise UsageError(
                f"the runs hold different cases: the {what} of {a.id!r} is {first!r} in the first "
                f"run and {second!r} in the second; run both on the same case file"
            )


def _flip(pair: RecordPair) -> Flip:
    a, b = pair
    verdict_a, verdict_b = _outcome(a), _outcome(b)
    return Flip(
        id=a.id,
        category=a.category,
        lang=a.lang,
        expected=a.expected.value,
        verdict_a=verdict_a,
        verdict_b=verdict_b,
        margin_a=a.probabilities.margin() if a.probabilities else None,
        margin_b=b.probabilities.margin() if b.probabilities else None,
        direction=f"{verdict_a}->{verdict_b}",
    )


def _outcome(record: Record) -> str:
    return record.verdict.value if isinstance(record.verdict, Verdict) else record.verdict


def _severity(outcome: str) -> int:
    return Verdict.REFUSE.severity if outcome == INVALID else Verdict(outcome).severity

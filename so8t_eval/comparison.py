"""How a candidate run differs from a base run on the same cases: metrics, tests, and flips."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

from so8t_eval.agreement import Flip, RecordPair, compare_runs
from so8t_eval.errors import UsageError
from so8t_eval.metric_differences import COMPARED, MetricDifference, metric_difference
from so8t_eval.metrics import N_RESAMPLES
from so8t_eval.paired_tests import holm
from so8t_eval.records import Record


@dataclass(frozen=True)
class Comparison:
    """The difference of two runs. ``flips`` are by direction, the most dangerous first."""

    n: int
    same_protocol: bool
    metrics: tuple[MetricDifference, ...]
    flips: dict[str, tuple[Flip, ...]]
    content_hashes: dict[str, str]


def pair_by_content(
    base: Sequence[Record], candidate: Sequence[Record], *, allow_protocol_difference: bool = False
) -> list[RecordPair]:
    """Pair two runs' records by content hash (and id, where one run repeats a content).

    Raises:
        UsageError: the runs differ in cases, expected verdicts or protocol; the text names the
            first difference.
    """
    groups = _by_hash(candidate)
    pairs: list[RecordPair] = []
    for content_hash, records in _by_hash(base).items():
        others = groups.pop(content_hash, [])
        for record in records:
            pairs.append(RecordPair(record, _partner(record, records, others)))
        extra = next((o for o in others if len(others) > len(records)), None)
        if extra is not None:
            raise _different_cases(f"{extra.id!r} occurs more often in the candidate")
    if groups:
        first = next(iter(groups.values()))[0]
        raise _different_cases(f"{first.id!r} is in the candidate only")
    for pair in pairs:
        _check_pair(pair, allow_protocol_difference)
    return pairs


def compare_records(
    base: Sequence[Record],
    candidate: Sequence[Record],
    *,
    seed: int = 0,
    confidence: float = 0.95,
    n_resamples: int = N_RESAMPLES,
    allow_protocol_difference: bool = False,
) -> Comparison:
    """Compare two runs of the same cases.

    Raises:
        UsageError: the runs cannot be paired; see ``pair_by_content``.
    """
    pairs = pair_by_content(base, candidate, allow_protocol_difference=allow_protocol_difference)
    differences = [
        metric_difference(metric, pairs, seed=seed, confidence=confidence, n_resamples=n_resamples)
        for metric in COMPARED
    ]
    adjusted = holm([difference.p_value for difference in differences])
    return Comparison(
        n=len(pairs),
        same_protocol=all(pair.a.protocol_hash == pair.b.protocol_hash for pair in pairs),
        metrics=tuple(
            replace(difference, p_holm=p)
            for difference, p in zip(differences, adjusted, strict=True)
        ),
        flips=_flips_by_direction(pairs),
        content_hashes={pair.a.id: pair.a.content_hash for pair in pairs},
    )


def under_id(record: Record, id_: str) -> Record:
    """Return the record under this id: itself where it has it, else a copy."""
    return record if record.id == id_ else record.model_copy(update={"id": id_})


def _by_hash(records: Sequence[Record]) -> dict[str, list[Record]]:
    groups: defaultdict[str, list[Record]] = defaultdict(list)
    for record in records:
        groups[record.content_hash].append(record)
    return dict(groups)


def _partner(record: Record, repeats: Sequence[Record], others: Sequence[Record]) -> Record:
    if not others:
        raise _different_cases(f"{record.id!r} is in the base only")
    if len(repeats) == len(others) == 1:
        return others[0]
    match = [other for other in others if other.id == record.id]
    if len(match) != 1:
        raise _different_cases(f"the content of {record.id!r} occurs several times")
    return match[0]


def _different_cases(what: str) -> UsageError:
    return UsageError(f"the runs hold different cases: {what}; run both on the same case file")


def _check_pair(pair: RecordPair, allow_protocol_difference: bool) -> None:
    base, candidate = pair
    if base.expected is not candidate.expected:
        raise UsageError(
            f"the runs hold different labels: {base.id!r} expects {base.expected.value} in the "
            f"base and {candidate.expected.value} in the candidate; run both on the same case file"
        )
    if base.protocol_hash != candidate.protocol_hash and not allow_protocol_difference:
        raise UsageError(
            f"the runs used different protocols (first at {base.id!r}: {base.protocol_hash[:12]} "
            f"and {candidate.protocol_hash[:12]}), so differences are not the model's alone; "
            "pass --allow-protocol-difference to compare all the same"
        )


def _flips_by_direction(pairs: Sequence[RecordPair]) -> dict[str, tuple[Flip, ...]]:
    """Flips under the base run's ids; ``compare_runs`` pairs by id."""
    same_ids = [under_id(pair.b, pair.a.id) for pair in pairs]
    groups: defaultdict[str, list[Flip]] = defaultdict(list)
    for flip in compare_runs([pair.a for pair in pairs], same_ids).flips:
        groups[flip.direction].append(flip)
    return {direction: tuple(flips) for direction, flips in groups.items()}

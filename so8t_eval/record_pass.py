"""Go through runs' records without keeping them: what a summary counts, and parts to compare."""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

from so8t_eval.id_digests import IdDigests
from so8t_eval.records import Record

_PART: Final = 1000


@dataclass
class RecordPass:
    """What one pass over a run's records leaves: 24 bytes a record, besides errors and latencies.

    ``alike`` has for every record one of the same labels and outcome, the same object for all of a
    kind: what slices and confusions look at.
    """

    ids: IdDigests = field(default_factory=IdDigests)
    alike: list[Record] = field(default_factory=list)
    models: set[str] = field(default_factory=set)
    protocols: set[str] = field(default_factory=set)
    errors: dict[str, str] = field(default_factory=dict)
    latencies_ms: list[float] = field(default_factory=list)
    split_cases: int = 0


def pass_over(records: Iterable[Record]) -> RecordPass:
    """Read every record once."""
    found = RecordPass()
    kinds: dict[Hashable, Record] = {}
    for record in records:
        kind = (record.expected, record.verdict, record.category, record.lang, record.tags)
        found.alike.append(kinds.setdefault(kind, record))
        found.ids.add(record.id)
        found.models.add(record.model_sha256)
        found.protocols.add(record.protocol_hash)
        found.split_cases += record.windows > 1
        if not record.is_valid:
            found.errors[record.id] = record.error or "no verdict"
        elif record.latency_ms is not None:
            found.latencies_ms.append(record.latency_ms)
    return found


def aligned_parts(
    runs: Sequence[Sequence[Record]], ids: Sequence[IdDigests]
) -> Iterator[list[Sequence[Record]]]:
    """Yield the runs' records of the same cases, some at a time, or all where orders differ."""
    if any(other != ids[0] for other in ids[1:]):
        yield list(runs)
        return
    streams = [iter(records) for records in runs]
    while (parts := [list(islice(stream, _PART)) for stream in streams])[0]:
        yield [*parts]

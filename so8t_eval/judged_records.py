"""A run's records on disk: what earlier sessions finished, and what this one returns."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, overload

import numpy as np

from so8t_eval.backends.judge import Model
from so8t_eval.cases import Case
from so8t_eval.line_sequence import LineSequence
from so8t_eval.records import Record

_HASH_BYTES: Final = 64
"""A content hash: hexadecimal digits of SHA-256."""


class FinishedRecords(Mapping[str, int]):
    """The byte at which each finished record begins in its file, by content hash.

    Holds 72 bytes a record. Of several with the same content the last counts.
    """

    def __init__(self, hashes: bytes, offsets: Sequence[int]) -> None:
        keys = np.frombuffer(hashes, dtype=f"S{_HASH_BYTES}")
        order = np.argsort(keys, kind="stable")
        last = np.append(keys[order][1:] != keys[order][:-1], True)[: keys.size]
        self._keys = keys[order][last]
        self._offsets = np.array(offsets, dtype=np.int64)[order][last]

    def __getitem__(self, content_hash: str) -> int:
        key = content_hash.encode("utf-8")
        place = int(np.searchsorted(self._keys, key))
        if place == self._keys.size or self._keys[place] != key:
            raise KeyError(content_hash)
        return int(self._offsets[place])

    def __iter__(self) -> Iterator[str]:
        return (key.decode("utf-8") for key in self._keys)

    def __len__(self) -> int:
        return int(self._keys.size)


def finished_records(
    records: LineSequence[Record], model: Model, *, retry_errors: bool = False
) -> FinishedRecords:
    """Return those records of a file that this model would write again.

    Same model, protocol, runtime version and settings. Failed cases count as finished unless
    ``retry_errors``.
    """
    info = model.info
    key = (info.backend, info.model_sha256, model.protocol.hash, info.runtime_hash)
    hashes, offsets = bytearray(), []
    for offset, record in zip(records.offsets, records, strict=True):
        found = (record.backend, record.model_sha256, record.protocol_hash, record.runtime_hash)
        if found == key and (record.is_valid or not retry_errors):
            hashes += record.content_hash.encode("utf-8").ljust(_HASH_BYTES, b"\0")[:_HASH_BYTES]
            offsets.append(offset)
    return FinishedRecords(bytes(hashes), offsets)


class JudgedRecords(Sequence[Record]):
    """One record per case, in the order of the cases, read again from disk when asked for.

    ``stored`` may be of an earlier session: records get the cases' present ids and labels.
    ``latencies_ms`` are by place; no other record has one.
    """

    def __init__(
        self,
        cases: Sequence[Case],
        stored: LineSequence[Record],
        latencies_ms: Mapping[int, float | None],
    ) -> None:
        self._cases, self._stored, self._latencies_ms = cases, stored, latencies_ms

    def __len__(self) -> int:
        return len(self._cases)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[place] for place in range(len(self))[index]]
        place = range(len(self))[index]
        return self._record(place, self._cases[place], self._stored[place])

    def __iter__(self) -> Iterator[Record]:
        for place, (case, stored) in enumerate(zip(self._cases, self._stored, strict=True)):
            yield self._record(place, case, stored)

    def _record(self, place: int, case: Case, stored: Record) -> Record:
        return stored.model_copy(
            update={
                "id": case.id,
                "expected": case.verdict,
                "category": case.category,
                "lang": case.lang,
                "tags": case.tags,
                "latency_ms": self._latencies_ms.get(place),
            }
        )

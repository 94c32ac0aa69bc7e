"""Many texts that should differ, kept as 16 bytes each: which of them repeats?"""

import hashlib
from typing import Final, NamedTuple

import numpy as np

_DIGEST_BYTES: Final = 16


class Repeat(NamedTuple):
    """Places of a text that was there before, and of its first occurrence."""

    place: int
    first: int


class IdDigests:
    """BLAKE2b digests of texts, in the order they were added."""

    def __init__(self) -> None:
        self._digests = bytearray()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, IdDigests) and self._digests == other._digests

    __hash__ = None  # type: ignore[assignment]

    def add(self, text: str) -> None:
        """Add the text at the next place."""
        encoded = text.encode("utf-8")
        self._digests += hashlib.blake2b(encoded, digest_size=_DIGEST_BYTES).digest()

    def first_repeat(self) -> Repeat | None:
        """Return the first place whose text was there before, None when all differ."""
        halves = np.frombuffer(bytes(self._digests), dtype=np.uint64).reshape(-1, 2)
        order = np.lexsort((halves[:, 1], halves[:, 0]))  # equal ones stay in their order
        repeats = order[1:][(halves[order[1:]] == halves[order[:-1]]).all(axis=1)]
        if not repeats.size:
            return None
        place = int(repeats.min())
        return Repeat(place, int((halves == halves[place]).all(axis=1).argmax()))

"""Near-duplicate texts: exact Jaccard similarity of character 5-grams, found without all pairs."""

import math
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Float, Int
from scipy import sparse

NGRAM_CHARACTERS: Final = 5
_SHARED_RAREST: Final = 8
"""Rarest grams a match must share: more means longer prefixes, and fewer false candidates."""

_BLOCK_ROWS: Final = 256
_VERIFIED_AT_A_TIME: Final = 1 << 15
_ROUNDING: Final = 1e-9


class NearDuplicate(NamedTuple):
    """Two texts by their places (``first`` < ``second``) and their similarity, 0 to 1."""

    first: int
    second: int
    similarity: float


def normalised(text: str) -> str:
    """Return the text in NFKC, case-folded, runs of white space as one blank."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def character_ngrams(text: str) -> frozenset[str]:
    """Return the 5-grams of the normalised text; a shorter text is its own only gram."""
    plain = normalised(text)
    last = max(1, len(plain) - NGRAM_CHARACTERS + 1)
    return frozenset(plain[i : i + NGRAM_CHARACTERS] for i in range(last) if plain)


def near_duplicates(texts: Sequence[str], threshold: float) -> Iterator[NearDuplicate]:
    """Yield every pair of texts whose Jaccard similarity reaches ``threshold``.

    Exact. Two such sets must share several of their rarest grams, so only pairs that do are
    compared; memory is bounded by the texts and one block of candidates, never by the square of
    their number.
    Texts without any character but white space match nothing.

    Raises:
        ValueError: ``threshold`` is not within (0, 1].

    Source: Bayardo, Ma and Srikant 2007, Scaling Up All Pairs Similarity Search (prefix filter).
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"expected a threshold within (0, 1], found {threshold}")
    grams = _gram_matrix(texts)
    sizes = np.diff(grams.indptr)
    least_common = np.ceil(threshold * sizes - _ROUNDING).astype(np.int64)
    must_share = np.minimum(_SHARED_RAREST, least_common)
    prefixes = _rarest_grams(grams, sizes - least_common + must_share)
    transposed = prefixes.T.tocsr()
    for start in range(0, len(texts), _BLOCK_ROWS):
        shared = (prefixes[start : start + _BLOCK_ROWS] @ transposed).tocoo()
        later, earlier = shared.row + start, shared.col
        possible = earlier < later
        possible &= shared.data >= np.minimum(must_share[earlier], must_share[later])
        possible &= _sizes_allow(sizes[earlier], sizes[later], threshold)
        yield from _verified(grams, sizes, earlier[possible], later[possible], threshold)


def _gram_matrix(texts: Sequence[str]) -> sparse.csr_array:
    """Return texts by grams with ones; columns go from the rarest gram to the commonest."""
    places: dict[str, int] = {}
    indices: list[int] = []
    row_ends = [0]
    for text in texts:
        indices.extend(places.setdefault(gram, len(places)) for gram in character_ngrams(text))
        row_ends.append(len(indices))
    columns = np.array(indices, dtype=np.int64)
    frequency = np.bincount(columns, minlength=len(places))
    rank = np.empty(len(places), dtype=np.int32)
    rank[np.argsort(frequency, kind="stable")] = np.arange(len(places), dtype=np.int32)
    matrix = sparse.csr_array(
        (np.ones(columns.size, dtype=np.int32), rank[columns], np.array(row_ends, dtype=np.int32)),
        shape=(len(texts), len(places)),
    )
    matrix.sort_indices()
    return matrix


def _rarest_grams(grams: sparse.csr_array, wanted: Int[np.ndarray, " texts"]) -> sparse.csr_array:
    """Keep the ``wanted`` rarest grams of each text."""
    place = np.arange(grams.nnz) - np.repeat(grams.indptr[:-1], np.diff(grams.indptr))
    kept = place < np.repeat(wanted, np.diff(grams.indptr))
    row_ends = np.concatenate([[0], np.cumsum(wanted)]).astype(np.int32)
    return sparse.csr_array((grams.data[kept], grams.indices[kept], row_ends), shape=grams.shape)


def _sizes_allow(
    a: Int[np.ndarray, " pairs"], b: Int[np.ndarray, " pairs"], threshold: float
) -> Bool[np.ndarray, " pairs"]:
    allowed: np.ndarray = np.minimum(a, b) >= threshold * np.maximum(a, b) - _ROUNDING
    return allowed


def _verified(
    grams: sparse.csr_array,
    sizes: Int[np.ndarray, " texts"],
    earlier: Int[np.ndarray, " pairs"],
    later: Int[np.ndarray, " pairs"],
    threshold: float,
) -> Iterator[NearDuplicate]:
    for number in range(math.ceil(earlier.size / _VERIFIED_AT_A_TIME)):
        piece = slice(number * _VERIFIED_AT_A_TIME, (number + 1) * _VERIFIED_AT_A_TIME)
        a, b = earlier[piece], later[piece]
        common: Float[np.ndarray, " pairs"] = grams[a].multiply(grams[b]).sum(axis=1)
        similarity = common / (sizes[a] + sizes[b] - common)
        for place in np.flatnonzero(similarity >= threshold - _ROUNDING):
            yield NearDuplicate(int(a[place]), int(b[place]), float(similarity[place]))

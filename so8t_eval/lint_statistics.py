"""What a case file consists of: counts, lengths, and how varied its wording is."""

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from so8t_eval.cases import Case
from so8t_eval.labels import SEVERITY_ORDER
from so8t_eval.near_duplicates import normalised

LENGTH_QUANTILES: Final = (0.0, 0.05, 0.5, 0.95, 1.0)
OPENING_WORDS: Final = 4
_OPENING_CHARACTERS: Final = 8
_RATIO_WINDOW_TOKENS: Final = 1000

_JAPANESE: Final = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uff66-\uff9f]")
_TOKENS: Final = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]{1,2}|[^\W\u3040-\u9fff]+")


@dataclass(frozen=True)
class Diversity:
    """How varied the requests of one language are.

    ``opening`` is the most frequent first four words (eight characters where words are not spaced)
    and ``n_with_opening`` how many of the ``n`` cases begin so. ``type_token_ratio`` is the mean
    share of different words in windows of 1000 words (pairs of characters in Japanese), so that it
    does not depend on the size of the file; None for fewer words.
    """

    n: int
    opening: str
    n_with_opening: int
    type_token_ratio: float | None


@dataclass(frozen=True)
class FileStatistics:
    """Counts of one file's cases. Keys of ``verdict_by_lang`` read like ``refuse/en``.

    ``length_characters`` holds the quantiles of ``LENGTH_QUANTILES`` by language; ``replies`` the
    cases with a reply by verdict.
    """

    n: int
    verdict_by_lang: dict[str, int]
    categories: dict[str, int]
    tags: dict[str, int]
    replies: dict[str, int]
    length_characters: dict[str, tuple[int, ...]]
    diversity: dict[str, Diversity]


def contains_japanese(text: str, *, mostly: bool = False) -> bool:
    """Whether a text holds kana or kanji; with ``mostly``, as more than half of its letters."""
    n_japanese = len(_JAPANESE.findall(text))
    return 2 * n_japanese > sum(map(str.isalpha, text)) if mostly else n_japanese > 0


def file_statistics(cases: Sequence[Case]) -> FileStatistics:
    """Return the counts of a file's cases."""
    by_lang: defaultdict[str, list[Case]] = defaultdict(list)
    for case in cases:
        by_lang[case.lang].append(case)
    return FileStatistics(
        n=len(cases),
        verdict_by_lang={
            f"{verdict.value}/{lang}": sum(case.verdict is verdict for case in by_lang[lang])
            for verdict in SEVERITY_ORDER
            for lang in sorted(by_lang)
        },
        categories=_by_count(Counter(case.category for case in cases)),
        tags=_by_count(Counter(tag for case in cases for tag in case.tags)),
        replies={
            verdict.value: sum(case.verdict is verdict and bool(case.reply) for case in cases)
            for verdict in SEVERITY_ORDER
        },
        length_characters={lang: _lengths(by_lang[lang]) for lang in sorted(by_lang)},
        diversity={lang: diversity(by_lang[lang]) for lang in sorted(by_lang)},
    )


def diversity(cases: Sequence[Case]) -> Diversity:
    """Return how varied the openings and words of at least one case are."""
    openings = Counter(_opening(case) for case in cases)
    opening, n = min(openings.items(), key=lambda item: (-item[1], item[0]))
    tokens = [token for case in cases for token in _TOKENS.findall(normalised(case.text))]
    return Diversity(len(cases), opening, n, type_token_ratio(tokens))


def type_token_ratio(tokens: Sequence[str]) -> float | None:
    """Return the mean share of different tokens over whole windows of 1000; None without one."""
    starts = range(0, len(tokens) - _RATIO_WINDOW_TOKENS + 1, _RATIO_WINDOW_TOKENS)
    shares = [
        len(set(tokens[start : start + _RATIO_WINDOW_TOKENS])) / _RATIO_WINDOW_TOKENS
        for start in starts
    ]
    return sum(shares) / len(shares) if shares else None


def _opening(case: Case) -> str:
    first = normalised(case.conversation[0].content)
    if contains_japanese(first, mostly=True):
        return first[:_OPENING_CHARACTERS]
    return " ".join(first.split()[:OPENING_WORDS])


def _lengths(cases: Sequence[Case]) -> tuple[int, ...]:
    lengths = [len(case.text) for case in cases]
    return tuple(int(q) for q in np.quantile(lengths, LENGTH_QUANTILES, method="nearest"))


def _by_count(counts: Counter[str]) -> dict[str, int]:
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))

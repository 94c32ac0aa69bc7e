"""What training sees of a case file: classes, replies, and lengths in tokens of the base model."""

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import numpy as np

from so8t_eval.case_lines import LocatedCase
from so8t_eval.cases import Case
from so8t_eval.labels import SEVERITY_ORDER
from so8t_train.base_vocabulary import BaseVocabulary
from so8t_train.case_strata import Stratum, count_strata, strata_of
from so8t_train.training_data import TrainingExample, tokenize_cases

TOKEN_QUANTILES: Final = (0.0, 0.05, 0.5, 0.95, 0.99, 1.0)
_ANY_LENGTH: Final = sys.maxsize
_NO_WEIGHTS: Final = dict.fromkeys(SEVERITY_ORDER, 1.0)


class TokenizedCase(NamedTuple):
    """A located case and the training example it makes."""

    located: LocatedCase
    example: TrainingExample

    @property
    def longest_pass(self) -> int:
        """Tokens of the longer of its two passes: what ``max_length`` limits."""
        reply = self.example.reply
        return max(self.example.prompt.length, reply.length if reply else 0)


@dataclass(frozen=True)
class TokenLengths:
    """Quantiles (``TOKEN_QUANTILES``) of tokens per case, ``longest_pass`` with verdict and reply."""

    n: int
    prompt: tuple[int, ...]
    longest_pass: tuple[int, ...]


@dataclass(frozen=True)
class TrainingFigures:
    """One file's cases. Keys of ``cases`` and ``with_reply`` read like ``refuse/en``.

    ``tokens`` goes by language; ``too_long`` has the ids of prompts too long, which training leaves
    out, and ``long_replies`` of those whose verdict alone is learned.
    """

    path: str
    n: int
    cases: dict[str, int]
    with_reply: dict[str, int]
    tokens: dict[str, TokenLengths]
    too_long: tuple[str, ...]
    long_replies: tuple[str, ...]


def training_example(case: Case, vocabulary: BaseVocabulary) -> TrainingExample:
    """Tokenize one case as training does, whatever its length.

    Raises:
        ModelFileError: the base model's chat template cannot render the conversation.
    """
    tokenizer, verdict_ids = vocabulary.tokenizer, vocabulary.verdict_ids
    data = tokenize_cases([case], tokenizer, verdict_ids, _NO_WEIGHTS, _ANY_LENGTH)
    return data.examples[0]


def training_figures(
    path: str, cases: Sequence[Case], tokenized: Sequence[TokenizedCase], max_length: int
) -> TrainingFigures:
    """Return the figures of a file; ``tokenized`` lacks the cases that cannot be rendered."""
    strata = strata_of(cases)
    return TrainingFigures(
        path=path,
        n=len(cases),
        cases=_named(strata, count_strata(cases)),
        with_reply=_named(strata, count_strata(case for case in cases if case.reply)),
        tokens={
            lang: _lengths([item for item in tokenized if item.located.case.lang == lang])
            for lang in sorted({item.located.case.lang for item in tokenized})
        },
        too_long=_ids(t for t in tokenized if t.example.prompt.length > max_length),
        long_replies=_ids(
            t for t in tokenized if t.example.prompt.length <= max_length < t.longest_pass
        ),
    )


def _ids(tokenized: Iterable[TokenizedCase]) -> tuple[str, ...]:
    return tuple(item.located.case.id for item in tokenized)


def _named(strata: Sequence[Stratum], counts: Counter[Stratum]) -> dict[str, int]:
    langs = sorted({stratum.lang for stratum in strata})
    every = [Stratum(verdict, lang) for verdict in SEVERITY_ORDER for lang in langs]
    return {str(stratum): counts[stratum] for stratum in every}


def _lengths(tokenized: Sequence[TokenizedCase]) -> TokenLengths:
    return TokenLengths(
        len(tokenized),
        _quantiles([item.example.prompt.length for item in tokenized]),
        _quantiles([item.longest_pass for item in tokenized]),
    )


def _quantiles(lengths: Sequence[int]) -> tuple[int, ...]:
    return tuple(int(q) for q in np.quantile(lengths, TOKEN_QUANTILES, method="nearest"))

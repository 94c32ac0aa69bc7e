"""A Hugging Face BPE tokenizer as a GGUF vocabulary, extended by the verdict tokens."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from gguf import TokenType
from tokenizers import Tokenizer

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.errors import ExportError
from so8t_eval.labels import VERDICT_TOKENS
from so8t_train.gguf_sentencepiece import (
    UNREACHED,
    SentencePieceRows,
    is_sentencepiece,
    sentencepiece_rows,
)
from so8t_train.gguf_tokenizer import WHOLE_WORDS_FIRST, pre_tokenizer

PRE_TOKENIZERS: Final = ("smollm", "llama-bpe", "qwen2", "gpt-2")
"""llama.cpp's pre-tokenizers that this exporter recognizes in a tokenizer.json."""


class Vocabulary(NamedTuple):
    """Text and kind of every row of the embedding matrix, by id, and how they are put together.

    ``model`` is ``tokenizer.ggml.model``: byte-level vocabularies (gpt2) have merges in order,
    SentencePiece-style ones (llama) scores by id.
    """

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    model: str = "gpt2"
    scores: Sequence[float] = ()
    add_space_prefix: bool = False
    unknown: int | None = None
    strips_after_tokens: bool = False


class SpecialIds(NamedTuple):
    """Ids of special tokens, None where the model has none, and whether text begins with bos."""

    bos: int | None
    eos: int | None
    padding: int | None
    add_bos: bool


def with_verdicts(tokens: list[str], types: list[int]) -> tuple[list[str], list[int]]:
    """Tokens and their types with the three verdict tokens, as control tokens, at the end."""
    added = [int(TokenType.CONTROL)] * len(VERDICT_TOKENS)
    return [*tokens, *VERDICT_TOKENS], [*(int(kind) for kind in types), *added]


def vocabulary_of(tokenizer: Tokenizer, rows: int, where: Path) -> Vocabulary:
    """The vocabulary of a tokenizer, padded to ``rows`` ids, without verdict tokens.

    Raises:
        ExportError: not BPE, text prepared in a way llama.cpp has not, or more tokens than rows.
    """
    spec: dict[str, Any] = json.loads(tokenizer.to_str())
    model = spec["model"]
    if model.get("type") != "BPE":
        raise ExportError(
            f"{where}: expected a BPE tokenizer (byte-level, or SentencePiece-style with byte "
            f"fallback), found {model.get('type')}; export with --format hf"
        )
    if is_sentencepiece(spec):
        return _sentencepiece(sentencepiece_rows(spec, where), rows, where)
    _check_byte_level(spec, where)
    texts = {int(i): text for text, i in model["vocab"].items()}
    kinds = dict.fromkeys(texts, int(TokenType.NORMAL))
    for token in spec.get("added_tokens", []):
        texts[token["id"]] = token["content"]
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        kinds[token["id"]] = int(kind)
    tokens, types = _all_rows(texts, kinds, rows, where)
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        pre=_pre_name(spec.get("pre_tokenizer"), bool(model.get("ignore_merges")), where),
    )


def _sentencepiece(found: SentencePieceRows, rows: int, where: Path) -> Vocabulary:
    tokens, types = _all_rows(found.texts, found.kinds, rows, where)
    return Vocabulary(
        tokens=tokens,
        types=types,
        merges=[],
        pre="default",
        model="llama",
        scores=[found.scores.get(i, UNREACHED) for i in range(rows)],
        add_space_prefix=found.add_space_prefix,
        unknown=found.unknown,
        strips_after_tokens=found.strips_after_tokens,
    )


def _all_rows(
    texts: Mapping[int, str], kinds: Mapping[int, int], rows: int, where: Path
) -> tuple[list[str], list[int]]:
    """Texts and kinds of every row, spare ones named."""
    if max(texts) >= rows:
        raise ExportError(
            f"{where}: expected at most {rows} tokens (rows of the embedding matrix), found id "
            f"{max(texts)}; resize the embeddings of the base model"
        )
    return (
        [texts.get(i, f"[PAD{i}]") for i in range(rows)],
        [kinds.get(i, int(TokenType.UNUSED)) for i in range(rows)],
    )


def special_ids(tokenizer: HfTokenizer, directory: Path) -> SpecialIds:
    """Special tokens as the verdict protocol knows them, and padding from tokenizer_config.json."""
    config = _read_json(directory / "tokenizer_config.json")
    padding = config.get("pad_token")
    text = padding.get("content") if isinstance(padding, dict) else padding
    protocol, inner = tokenizer.protocol, tokenizer.tokenizer
    bos = inner.token_to_id(protocol.bos_token) if protocol.bos_token else None
    started: list[int] = inner.encode("a", add_special_tokens=True).ids
    return SpecialIds(
        bos=bos,
        eos=inner.token_to_id(protocol.eos_token) if protocol.eos_token else None,
        padding=inner.token_to_id(text) if text else None,
        add_bos=bos is not None and started[:1] == [bos],
    )


def _check_byte_level(spec: Mapping[str, Any], where: Path) -> None:
    """NFC passes although llama.cpp has none: it moves only text that is not composed."""
    normalizer = spec.get("normalizer")
    if normalizer not in (None, {"type": "NFC"}):
        raise ExportError(
            f"{where}: expected no normalizer, which llama.cpp has not for byte-level BPE, found "
            f"{json.dumps(normalizer)[:200]}; export with --format hf"
        )


def _pre_name(found: dict[str, Any] | None, whole_words_first: bool, where: Path) -> str:
    for name in PRE_TOKENIZERS:
        if found is None or _essence(_as_json(name)) != _essence(found):
            continue
        if whole_words_first == (name in WHOLE_WORDS_FIRST):
            return name
        if not whole_words_first:
            return "smaug-bpe"  # llama-bpe's pattern, every word through the merges
        raise ExportError(
            f"{where}: expected ignore_merges only with the pre-tokenizer llama-bpe, found it with "
            f"{name}; export with --format hf"
        )
    raise ExportError(
        f"{where}: expected a pre-tokenizer that llama.cpp knows as one of "
        f"{', '.join(PRE_TOKENIZERS)}, found {json.dumps(found)[:200]}; export with --format hf"
    )


def _as_json(name: str) -> dict[str, Any]:
    from tokenizers import models

    bare = Tokenizer(models.BPE())
    bare.pre_tokenizer = pre_tokenizer(name)
    value: dict[str, Any] = json.loads(bare.to_str())["pre_tokenizer"]
    return value


def _essence(value: Any) -> Any:
    """A pre-tokenizer's JSON without what cannot change ids: offsets, and sequences of one."""
    if isinstance(value, list):
        return [_essence(item) for item in value]
    if not isinstance(value, dict):
        return value
    items = value.get("pretokenizers")
    if isinstance(items, list) and len(items) == 1:
        return _essence(items[0])
    return {key: _essence(item) for key, item in value.items() if key != "trim_offsets"}


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value

"""A SentencePiece-style BPE tokenizer (byte fallback) as GGUF's ``llama`` vocabulary.

Both algorithms merge neighbours until nothing merges: Hugging Face by the rank of listed pairs,
llama.cpp by the score of the token that two neighbours make, listed or not. They agree where every
pair that makes a token is listed, and pairs that make the same token have neighbouring ranks. What
is then left to differ, two ways to the same token that overlap, is tried in ``vocabulary_check``.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, NoReturn

from gguf import TokenType

from so8t_eval.errors import ExportError

SPACE: Final = "\u2581"
UNREACHED: Final = -10000.0
"""Score of tokens that no merge makes; it is never compared."""
_BYTES: Final = [f"<0x{byte:02X}>" for byte in range(256)]
_NEUTRAL: Final = {
    "dropout": (None, 0.0),
    "continuing_subword_prefix": (None, ""),
    "end_of_word_suffix": (None, ""),
    "ignore_merges": (None, False),
}
_STRIPPING: Final = ("phi-3", "phi3")
_NEVER_STRIPPING: Final = ("<unk>", "<s>", "<|endoftext|>")
_PHI3_TOKENS: Final = (*_NEVER_STRIPPING, "</s>")
"""llama.cpp looks these up in every model that it takes for Phi 3."""


class SentencePieceRows(NamedTuple):
    """Tokens by id without filler rows, their kinds and scores, and how text is prepared."""

    texts: dict[int, str]
    kinds: dict[int, int]
    scores: dict[int, float]
    add_space_prefix: bool
    unknown: int | None
    strips_after_tokens: bool


def is_sentencepiece(spec: Mapping[str, Any]) -> bool:
    """Whether a tokenizer.json is of this kind."""
    model = spec["model"]
    return model.get("type") == "BPE" and bool(model.get("byte_fallback"))


def sentencepiece_rows(spec: Mapping[str, Any], where: Path) -> SentencePieceRows:
    """The vocabulary of a decoded tokenizer.json.

    Raises:
        ExportError: llama.cpp would give other ids for some text, with the reason.
    """
    model: dict[str, Any] = spec["model"]
    vocabulary: dict[str, int] = model["vocab"]
    _check_model(model, where)
    prefix = _space_prefix(spec, where)
    added: list[dict[str, Any]] = spec.get("added_tokens", [])
    texts = {i: text for text, i in vocabulary.items()} | {t["id"]: t["content"] for t in added}
    merges = [_pair(merge) for merge in model["merges"]]
    scores = _scores(merges, where)
    _check_complete(texts, set(merges), _matched_first(added), where)
    kinds = dict.fromkeys(texts, int(TokenType.NORMAL))
    kinds |= {vocabulary[byte]: int(TokenType.BYTE) for byte in _BYTES}
    for token in added:
        kind = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
        kinds[token["id"]] = int(kind)
    unknown = next((i for i, text in texts.items() if text == model.get("unk_token")), None)
    if unknown is not None:
        kinds[unknown] = int(TokenType.UNKNOWN)
    return SentencePieceRows(
        texts,
        kinds,
        {i: scores.get(text, UNREACHED) for i, text in texts.items()},
        prefix,
        unknown,
        _strips_after_tokens(added, where),
    )


def overlapping_splits(spec: Mapping[str, Any]) -> Iterator[str]:
    """Texts in which two different pairs make the same token and share a part."""
    by_token: dict[str, list[tuple[str, str]]] = {}
    for merge in spec["model"]["merges"]:
        left, right = _pair(merge)
        by_token.setdefault(left + right, []).append((left, right))
    for pairs in by_token.values():
        rights = dict(pairs)
        for left, middle in pairs:
            if middle in rights and left != middle:
                yield left + middle + rights[middle]


def model_name(name: str, *, strips_after_tokens: bool) -> str:
    """``name`` as llama.cpp may read it: by it alone it drops white space after added tokens."""
    strips = any(part in name.lower() for part in _STRIPPING)
    if strips == strips_after_tokens:
        return name
    return f"phi-3 {name}" if strips_after_tokens else re.sub(r"(?i)phi-?3", "phi_3", name)


def _check_model(model: Mapping[str, Any], where: Path) -> None:
    for key, neutral in _NEUTRAL.items():
        if model.get(key) not in neutral:
            _refuse(where, f"model.{key} = {model[key]!r}")
    missing = [byte for byte in _BYTES if byte not in model["vocab"]]
    if missing:
        _refuse(where, f"byte fallback without the tokens {', '.join(missing[:3])}")


def _space_prefix(spec: Mapping[str, Any], where: Path) -> bool:
    """Whether a space is put before every piece of text between added tokens."""
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    steps = _steps(spec.get("normalizer"), "normalizers")
    pre = _steps(spec.get("pre_tokenizer"), "pretokenizers")
    # After the normalizer no space is left to split at.
    splits = {"type": "Split", "pattern": {"String": " "}, "invert": False}
    pre = [step for step in pre if {k: step.get(k) for k in splits} != splits]
    if not pre and steps in ([prepend, replace], [replace]):
        return len(steps) == 2
    if not steps and len(pre) == 1 and pre[0].get("type") == "Metaspace":
        scheme = pre[0].get("prepend_scheme")
        known = pre[0].get("replacement") == SPACE and pre[0].get("split") is False
        if known and scheme == "never":
            return False
    found = {"normalizer": spec.get("normalizer"), "pre_tokenizer": spec.get("pre_tokenizer")}
    return _refuse(where, f"text prepared as it has no switch for, {json.dumps(found)[:300]}")


def _steps(step: Mapping[str, Any] | None, key: str) -> list[dict[str, Any]]:
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [dict(step)]


def _scores(merges: list[tuple[str, str]], where: Path) -> dict[str, float]:
    scores: dict[str, float] = {}
    last = ""
    for left, right in merges:
        token = left + right
        if token != last and token in scores:
            _refuse(where, f"two ways to {token!r} whose ranks lie apart")
        scores[token] = scores.get(token, -float(len(scores)))
        last = token
    return scores


def _check_complete(
    texts: Mapping[int, str],
    merges: set[tuple[str, str]],
    matched_first: set[str],
    where: Path,
) -> None:
    known = set(texts.values())
    for text in texts.values():
        if text in matched_first:
            continue
        for i in range(1, len(text)):
            pair = text[:i], text[i:]
            if pair[0] in known and pair[1] in known and pair not in merges:
                _refuse(where, f"no merge of {pair[0]!r} and {pair[1]!r}, whose text is a token")


def _matched_first(added: list[dict[str, Any]]) -> set[str]:
    """Tokens whose text never reaches the merges: matched in the raw text, special or not."""
    return {t["content"] for t in added if not t["special"] and SPACE not in t["content"]}


def _strips_after_tokens(added: list[dict[str, Any]], where: Path) -> bool:
    """Whether white space after added tokens is dropped, which llama.cpp does for Phi 3."""
    for token in added:
        for key in ("lstrip", "single_word", "normalized"):
            if token.get(key):
                _refuse(where, f"the added token {token['content']!r} with {key}")
    stripping = [token["content"] for token in added if token.get("rstrip")]
    if not stripping:
        return False
    expected = [t["content"] for t in added if t["content"] not in _NEVER_STRIPPING]
    if stripping != expected:
        differing = sorted(set(stripping) ^ set(expected))
        _refuse(where, f"rstrip on some added tokens only, unlike Phi 3 ({', '.join(differing)})")
    missing = set(_PHI3_TOKENS) - {token["content"] for token in added}
    if missing:
        _refuse(where, f"rstrip on added tokens, but not Phi 3's {', '.join(sorted(missing))}")
    return True


def _pair(merge: str | list[str]) -> tuple[str, str]:
    left, right = merge.split(" ", 1) if isinstance(merge, str) else merge
    return left, right


def _refuse(where: Path, what: str) -> NoReturn:
    raise ExportError(
        f"{where}: expected a SentencePiece-style BPE tokenizer that llama.cpp follows exactly, found "
        f"{what}; export with --format hf"
    )

"""A tiny tokenizer.json of SentencePiece's kind: spaces as ▁, byte fallback, every way to a token."""

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from tokenizers import AddedToken, Tokenizer, models, trainers

SPACE = "\u2581"
UNKNOWN = "<unk>"
_RUNS = f"{SPACE * 24} {SPACE * 9} ------------ ======== aaaaaaa -- == \n\n\n\n" + 4 * (
    f" --- === aaa {SPACE * 3}"  # runs of three: two ways to one token that overlap
)


class Kind(NamedTuple):
    """How a family's release prepares text and treats its added tokens."""

    add_space_prefix: bool
    strips_after_tokens: bool = False
    user_defined: tuple[str, ...] = ()
    more_special: tuple[str, ...] = ()


Flavour = Literal["llama", "phi3", "gemma"]
KINDS: dict[Flavour, Kind] = {
    "llama": Kind(add_space_prefix=True),
    "phi3": Kind(
        add_space_prefix=True,
        strips_after_tokens=True,
        user_defined=("<tool>",),
        more_special=("<s>", "</s>"),
    ),
    "gemma": Kind(add_space_prefix=False, user_defined=("\n\n", SPACE * 2, "<table>")),
}


@lru_cache(maxsize=8)
def sentencepiece_json(
    flavour: Flavour, special: tuple[str, ...], corpus: Sequence[str], size: int
) -> str:
    """Train ``size`` tokens and list every pair that makes one, as Hugging Face's converter does."""
    kind = KINDS[flavour]
    controls = (*special, UNKNOWN, *kind.more_special)
    tokens = [*controls, *kind.user_defined, *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=size, show_progress=False)
    # No word boundaries but those SentencePiece has: a piece may begin with a space, not hold one.
    words = [f"{SPACE}{word}" for text in corpus for word in text.split(" ")]
    trained.train_from_iterator([*words, *_RUNS.split(" ")], trainer)
    spec: dict[str, Any] = json.loads(trained.to_str())
    ordered = sorted(spec["model"]["vocab"], key=spec["model"]["vocab"].__getitem__)
    tokens += [text for text in ordered if text not in tokens][: size - len(tokens)]
    if len(tokens) != size:
        raise ValueError(f"expected a vocabulary of {size} tokens, found {len(tokens)}")
    vocabulary = {text: i for i, text in enumerate(tokens)}
    spec["model"] |= {
        "vocab": vocabulary,
        "merges": _all_merges(vocabulary),
        "byte_fallback": True,
        "unk_token": UNKNOWN,
        "fuse_unk": True,
    }
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    prepend = {"type": "Prepend", "prepend": SPACE}
    spec["normalizer"] = (
        {"type": "Sequence", "normalizers": [prepend, replace]}
        if kind.add_space_prefix
        else replace
    )
    back = {"type": "Replace", "pattern": {"String": SPACE}, "content": " "}
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] * kind.add_space_prefix
    steps = [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]
    spec["decoder"] = {"type": "Sequence", "decoders": steps}
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    for text in controls:
        strips = kind.strips_after_tokens and text not in ("<|endoftext|>", UNKNOWN, "<s>")
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, rstrip=strips)])
    strips = kind.strips_after_tokens
    for text in kind.user_defined:
        tokenizer.add_tokens([AddedToken(text, normalized=False, rstrip=strips)])
    written: str = tokenizer.to_str()
    return written


def _all_merges(vocabulary: dict[str, int]) -> list[tuple[str, str]]:
    return [
        (text[:i], text[i:])
        for text in vocabulary
        for i in range(1, len(text))
        if text[:i] in vocabulary and text[i:] in vocabulary
    ]

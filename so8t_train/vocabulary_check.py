"""Try a converted vocabulary in llama.cpp itself before anything is exported with it."""

import json
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import llama_cpp
from tokenizers import Tokenizer

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.backends.llamacpp_context import mute_logs
from so8t_eval.errors import ExportError
from so8t_train.gguf_sentencepiece import SPACE, is_sentencepiece, overlapping_splits

_RANDOM_TEXTS: Final = 4000
_LONGEST_RUN: Final = 80
_SEED: Final = 0


def check_vocabulary(write: Callable[[Path], None], tokenizer: HfTokenizer, where: Path) -> None:
    """Compare ids on every token's text, on runs, on pairs that compete, and on random Unicode.

    ``write`` writes a GGUF of the vocabulary alone. Byte-level vocabularies, which are carried over
    with their merges, are not tried. ``where`` names the tokenizer in the error.

    Raises:
        ExportError: some text gets other ids, showing it.
    """
    spec: dict[str, Any] = json.loads(tokenizer.tokenizer.to_str())
    if not is_sentencepiece(spec):
        return
    mute_logs()
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "vocabulary.gguf"
        write(path)
        native = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
        try:
            for text, parse_special in probes(tokenizer.tokenizer, spec):
                expected = tokenizer.tokenize(text, parse_special)
                found = native.tokenize(text.encode(), add_bos=False, special=parse_special)
                if found != expected:
                    raise ExportError(
                        f"{where}: expected ids {expected[:12]} for {text[:60]!r}, found "
                        f"{found[:12]} in llama.cpp; {_remedy(tokenizer.tokenizer, text)}"
                    )
        finally:
            native.close()


def probes(tokenizer: Tokenizer, spec: dict[str, Any]) -> Iterator[tuple[str, bool]]:
    """Texts, and whether special tokens are recognized in them."""
    rng = random.Random(_SEED)  # noqa: S311 - no secret
    texts = [text.replace(SPACE, " ") for text in tokenizer.get_vocab(with_added_tokens=True)]
    for text in texts:
        yield text, False
    for text in overlapping_splits(spec):
        yield text.replace(SPACE, " "), False
    for letter in sorted({text[0] for text in texts if len(text) > 1 and len(set(text)) == 1}):
        for n in range(1, _LONGEST_RUN):
            yield letter * n, False
            yield f"a{letter * n}b", False
    for _ in range(_RANDOM_TEXTS):
        pieces = rng.choices(texts, k=rng.randint(2, 6))
        if rng.random() < 0.5:
            pieces.insert(rng.randint(0, len(pieces)), _random_unicode(rng))
        yield "".join(pieces), False
    for token in tokenizer.get_added_tokens_decoder().values():
        for text in (token.content, f"a{token.content}b", f" {token.content}\n{token.content} c"):
            yield text, True


def _remedy(tokenizer: Tokenizer, text: str) -> str:
    added = tokenizer.get_added_tokens_decoder().values()
    if any(token.content == text and not token.special for token in added):
        return (
            "its name makes it a control token there: set its special to true in tokenizer.json "
            "and train again, or export with --format hf"
        )
    return "export with --format hf"


def _random_unicode(rng: random.Random) -> str:
    ranges = ((0, 0x80), (0x80, 0x800), (0x800, 0xD800), (0xE000, 0x10000), (0x10000, 0x110000))
    return "".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randint(1, 8)))

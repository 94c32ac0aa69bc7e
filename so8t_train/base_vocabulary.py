"""A base model's tokenizer and the ids its verdict tokens will have, without loading weights."""

import re
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open
from tokenizers import pre_tokenizers
from tokenizers.decoders import ByteLevel

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.errors import ModelFileError
from so8t_eval.labels import SEVERITY_ORDER, VERDICT_TOKENS
from so8t_train.base_model import BaseModelSource, load_tokenizer, open_gguf, resolve_base
from so8t_train.gguf_sentencepiece import SPACE

_GGUF_EMBEDDING = "token_embd.weight"
_HF_EMBEDDING = "embed_tokens.weight"


class Piece(NamedTuple):
    """What one token stands for. ``raw`` may be a part of a character's UTF-8 bytes."""

    raw: bytes
    is_special: bool

    @property
    def text(self) -> str | None:
        """The piece as text, None where it is no whole number of characters."""
        try:
            return self.raw.decode("utf-8")
        except UnicodeDecodeError:
            return None


class BaseVocabulary(NamedTuple):
    """Tokenizer of a base model, and the verdict tokens' ids in severity order."""

    name: str
    tokenizer: HfTokenizer
    verdict_ids: tuple[int, int, int]

    @property
    def control_texts(self) -> tuple[str, ...]:
        """Texts of all control tokens: the base's own and the verdicts."""
        added = self.tokenizer.tokenizer.get_added_tokens_decoder().values()
        own = [token.content for token in added if token.special]
        return tuple(dict.fromkeys([*own, *VERDICT_TOKENS]))

    def piece(self, token: int) -> Piece:
        """What a token stands for, the verdict tokens included."""
        if token in self.verdict_ids:
            text = SEVERITY_ORDER[self.verdict_ids.index(token)].token
            return Piece(text.encode(), True)
        inner = self.tokenizer.tokenizer
        added = inner.get_added_tokens_decoder().get(token)
        if added is not None:
            return Piece(added.content.encode(), added.special)
        written = inner.id_to_token(token) or ""
        if isinstance(inner.decoder, ByteLevel):
            return Piece(_bytes_of(written), False)
        if getattr(inner.model, "byte_fallback", False):
            return Piece(_sentencepiece_bytes(written), False)
        return Piece(written.encode(), False)


def open_vocabulary(name: str) -> BaseVocabulary:
    """Read the tokenizer of a base model (names as in ``base_model`` of a configuration).

    Raises:
        ConfigError: nothing of that name exists here.
        ModelFileError: its files are broken or incomplete.
    """
    source = resolve_base(name)
    first = embedding_rows(source)
    return BaseVocabulary(name, load_tokenizer(source), (first, first + 1, first + 2))


def embedding_rows(source: BaseModelSource) -> int:
    """Return the rows of the embedding matrix, padding included: the first verdict token's id.

    Raises:
        ModelFileError: the model has no embedding matrix of a known name.
    """
    rows = _rows_in_gguf(source.path) if source.is_gguf else _rows_in_directory(source.path)
    if rows is None:
        raise ModelFileError(f"{source.path} has no embedding matrix; fetch it again")
    return rows


def _rows_in_gguf(path: Path) -> int | None:
    found = (t for t in open_gguf(path).tensors if t.name == _GGUF_EMBEDDING)
    return next((int(tensor.shape[-1]) for tensor in found), None)


def _rows_in_directory(directory: Path) -> int | None:
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "np") as weights:
                for name in weights.keys():  # noqa: SIM118 - no mapping
                    if name.endswith(_HF_EMBEDDING):
                        return int(weights.get_slice(name).get_shape()[0])
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"{file} is broken or truncated ({error}); fetch it again"
            ) from error
    return None


def _sentencepiece_bytes(written: str) -> bytes:
    """The bytes that a SentencePiece-style vocabulary entry stands for."""
    byte = re.fullmatch(r"<0x([0-9A-F]{2})>", written)
    return bytes([int(byte[1], 16)]) if byte else written.replace(SPACE, " ").encode()


def _bytes_of(written: str) -> bytes:
    """The bytes that a byte-level vocabulary entry stands for."""
    table = _byte_alphabet()
    if all(letter in table for letter in written):
        return bytes(table[letter] for letter in written)
    return written.encode()


@lru_cache(maxsize=1)
def _byte_alphabet() -> dict[str, int]:
    """Letter of the byte-level alphabet to byte.

    Bytes whose own letter is not in the alphabet have those from U+0100 on, in order.
    """
    letters = set(pre_tokenizers.ByteLevel.alphabet())
    moved = [byte for byte in range(256) if chr(byte) not in letters]
    own = {chr(byte): byte for byte in range(256) if chr(byte) in letters}
    return own | {chr(256 + place): byte for place, byte in enumerate(moved)}

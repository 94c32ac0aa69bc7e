"""Tokenization with the Hugging Face ``tokenizers`` library, as the verdict protocol needs it."""

import json
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, pre_tokenizers
from tokenizers.decoders import ByteLevel
from tokenizers.models import BPE

from so8t_eval.errors import ModelFileError
from so8t_eval.protocol import VerdictProtocol


class HfTokenizer:
    """A ``tokenizers.Tokenizer`` with its chat template; plain text never becomes special tokens."""

    def __init__(
        self, tokenizer: Tokenizer, chat_template: str, bos_token: str = "", eos_token: str = ""
    ) -> None:
        self.tokenizer = tokenizer
        self.tokenizer.no_padding()
        self.tokenizer.no_truncation()
        self._dropped = _mark_missing_bytes(tokenizer)
        self.protocol = VerdictProtocol(chat_template, bos_token, eos_token)

    def tokenize(self, text: str, parse_special: bool) -> list[int]:
        """Token ids of ``text``; special tokens are recognised only when ``parse_special``."""
        self.tokenizer.encode_special_tokens = not parse_special
        encoding = self.tokenizer.encode(text, add_special_tokens=False)
        ids: list[int] = encoding.ids
        if self._dropped is None or self._dropped not in ids:
            return ids
        written = self.tokenizer.id_to_token(self._dropped) if parse_special else None
        return [
            token
            for token, (start, stop) in zip(ids, encoding.offsets, strict=True)
            if token != self._dropped or text[start:stop] == written
        ]

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids`` without special tokens."""
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text


def _mark_missing_bytes(tokenizer: Tokenizer) -> int | None:
    """Treat bytes that have no token as llama.cpp does: no id, and nothing merges across them.

    Some byte-level vocabularies lack a few control characters. Without an unknown token the library
    drops such a byte *before* merging, so its neighbours could join; with one, it keeps its place.
    Returns the id that then stands for "no token", None where every byte has one.
    """
    if not isinstance(tokenizer.model, BPE) or not isinstance(tokenizer.decoder, ByteLevel):
        return None
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if all(tokenizer.token_to_id(letter) is not None for letter in alphabet):
        return None
    special = [i for i, token in tokenizer.get_added_tokens_decoder().items() if token.special]
    if not special:
        return None
    # Only a template piece that spells a special token yields it, so its id is free for the rest.
    tokenizer.model.unk_token = tokenizer.id_to_token(min(special))
    tokenizer.model.fuse_unk = False
    return min(special)


def load_hf_tokenizer(directory: Path) -> HfTokenizer:
    """Read ``tokenizer.json``, ``tokenizer_config.json`` and the chat template of a model directory.

    Raises:
        ModelFileError: a file is missing or broken, or the tokenizer has no chat template.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ModelFileError(
            f"{directory} has no tokenizer.json; save the tokenizer in the fast format "
            "(tokenizer.save_pretrained) beside the model"
        )
    try:
        tokenizer = Tokenizer.from_file(str(path))
        config: dict[str, Any] = _read_json(directory / "tokenizer_config.json")
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelFileError(f"{path} cannot be read: {error}; copy or export it again") from error
    template = _chat_template(directory, config)
    if not template:
        raise ModelFileError(
            f"{directory} has no chat template; the verdict protocol renders prompts with the base "
            "model's own template: use an instruct model, or add chat_template.jinja"
        )
    return HfTokenizer(
        tokenizer, template, _token_text(config, "bos_token"), _token_text(config, "eos_token")
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return value


def _chat_template(directory: Path, config: dict[str, Any]) -> str:
    file = directory / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template") or ""
    if isinstance(template, list):  # several named templates
        named = {item["name"]: item["template"] for item in template}
        template = named.get("default", "")
    return str(template)


def _token_text(config: dict[str, Any], key: str) -> str:
    value = config.get(key) or ""
    return str(value["content"]) if isinstance(value, dict) else str(value)

"""A tiny model directory as ``so8t-train export --format hf`` leaves it, made on the spot."""

import json
from pathlib import Path

from support.tiny_hf import VOCABULARY, Family, make_tiny_model
from tokenizers import AddedToken, Tokenizer

from so8t_eval.backends.hf_tokenizer import load_hf_tokenizer
from so8t_eval.backends.torch_hf import MODEL_FACTS
from so8t_eval.labels import VERDICT_TOKENS

VERDICT_IDS = [VOCABULARY, VOCABULARY + 1, VOCABULARY + 2]


def make_tiny_export(
    directory: Path, family: Family = "llama", *, tied: bool = True, **changes: object
) -> Path:
    """Write the directory; ``changes`` override entries of ``so8t_model.json``."""
    make_tiny_model(directory, family, tied=tied, spare_rows=3)
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in VERDICT_TOKENS]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    facts: dict[str, object] = {
        "format_version": 1,
        "protocol_hash": load_hf_tokenizer(directory).protocol.hash,
        "verdict_token_ids": VERDICT_IDS,
        "temperature": 1.25,
        "base_model": "tiny",
        "adapter_sha256": "0" * 64,
        **changes,
    }
    (directory / MODEL_FACTS).write_text(json.dumps(facts), encoding="utf-8")
    return directory

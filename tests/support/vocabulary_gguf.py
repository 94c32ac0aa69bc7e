"""Write GGUFs that hold a vocabulary and no tensors; llama.cpp loads them with ``vocab_only``."""

import json
from collections.abc import Sequence
from pathlib import Path

from gguf import GGUFWriter, TokenType
from support.tiny_hf import CHAT_TEMPLATE, EOS, SPECIAL_TOKENS, save_tiny_tokenizer

from so8t_train.base_model import load_tokenizer, resolve_base
from so8t_train.base_weights import read_base_weights
from so8t_train.families import gguf_architecture
from so8t_train.gguf_metadata import make_metadata


def write_vocabulary_gguf(
    path: Path,
    *,
    pre: str = "smollm",
    model: str = "gpt2",
    chat_template: str = CHAT_TEMPLATE,
    user_defined: Sequence[str] = (),
    unreachable: Sequence[str] = (),
    without: str | None = None,
) -> Path:
    """Vocabulary and merges of the tiny tokenizer; ``unreachable`` words are tokens no merge makes."""
    family = "llama" if pre in ("smollm", "gpt-2") else "qwen2"
    save_tiny_tokenizer(path.parent, family)
    bpe = json.loads((path.parent / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    tokens = [*sorted(bpe["vocab"], key=bpe["vocab"].__getitem__), *unreachable, *user_defined]
    types = [
        TokenType.CONTROL
        if token in SPECIAL_TOKENS
        else TokenType.USER_DEFINED
        if token in user_defined
        else TokenType.NORMAL
        for token in tokens
    ]
    writer = GGUFWriter(path, "llama")
    writer.add_context_length(512)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(32)
    writer.add_head_count(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model(model)
    writer.add_tokenizer_pre(pre)
    if without != "tokens":
        writer.add_token_list(tokens)
    writer.add_token_types(types[:-1] if without == "a type" else types)
    if without != "merges":
        writer.add_token_merges([" ".join(merge) for merge in bpe["merges"]])
    writer.add_eos_token_id(SPECIAL_TOKENS.index(EOS))
    if chat_template:
        writer.add_chat_template(chat_template)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_base_vocabulary(path: Path, base: Path) -> Path:
    """Write the metadata that an export of a Hugging Face base would have, and no tensors."""
    weights = read_base_weights(resolve_base(str(base)))
    writer = GGUFWriter(path, gguf_architecture(weights.architecture))
    make_metadata(writer, weights, load_tokenizer(weights.source))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path

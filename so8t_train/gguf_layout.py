"""The same weights under two names and two layouts: Hugging Face's and GGUF's."""

import re
from typing import Final, NamedTuple

from torch import Tensor

ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")
"""Families whose tensors this module can name. Their names are equal in both worlds."""

_OUTER: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK: Final = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_OUTER_BACK: Final = {hf: gguf for gguf, hf in _OUTER.items()}
_BLOCK_BACK: Final = {hf: gguf for gguf, hf in _BLOCK.items()}
_PERMUTED: Final = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(?:weight|bias)")


class HeadCounts(NamedTuple):
    """Attention heads of queries, and of keys and values."""

    query: int
    key_value: int


def hf_name(name: str) -> str | None:
    """The Hugging Face name of a GGUF tensor; None if the families here have no such weight."""
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    if match is None or match[2] not in _BLOCK:
        return None
    return f"model.layers.{match[1]}.{_BLOCK[match[2]]}.{suffix}"


def gguf_name(name: str) -> str | None:
    """The GGUF name of a Hugging Face weight; None if the families here have no such weight."""
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER_BACK:
        return f"{_OUTER_BACK[stem]}.{suffix}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)", stem)
    if match is None or match[2] not in _BLOCK_BACK:
        return None
    return f"blk.{match[1]}.{_BLOCK_BACK[match[2]]}.{suffix}"


def to_gguf_layout(name: str, weight: Tensor, architecture: str, heads: HeadCounts) -> Tensor:
    """Rows of a weight named as in Hugging Face, in GGUF's order.

    llama.cpp rotates neighbouring features of the llama family (RoPE type NORM), Hugging Face the
    two halves of a head; so the rows of q and k are interleaved. Other families use NEOX as is.

    Source: ``LlamaModel.permute`` in llama.cpp's convert_hf_to_gguf.py.
    """
    n = _permuted_heads(name, architecture, heads)
    if n is None:
        return weight
    halves = weight.reshape(n, 2, weight.shape[0] // n // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def to_hf_layout(name: str, weight: Tensor, architecture: str, heads: HeadCounts) -> Tensor:
    """The inverse of ``to_gguf_layout``."""
    n = _permuted_heads(name, architecture, heads)
    if n is None:
        return weight
    pairs = weight.reshape(n, weight.shape[0] // n // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def _permuted_heads(name: str, architecture: str, heads: HeadCounts) -> int | None:
    match = _PERMUTED.fullmatch(name) if architecture == "llama" else None
    if match is None:
        return None
    return heads.query if match[1] == "q" else heads.key_value

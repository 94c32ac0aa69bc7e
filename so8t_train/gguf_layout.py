"""The same weights under two names and two layouts: Hugging Face's and GGUF's."""

import re
from typing import Final, NamedTuple

from torch import Tensor

from so8t_train.families import gguf_architecture

ARCHITECTURES: Final = ("llama", "qwen2", "qwen3")
"""Architectures of which a GGUF file can be the base."""

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
_FUSED: Final = {
    "attn_norm": "input_layernorm",
    "attn_qkv": "self_attn.qkv_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_up": "mlp.gate_up_proj",  # both halves, gate first, in both worlds
    "ffn_down": "mlp.down_proj",
}
_SANDWICHED: Final = _BLOCK | {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_OWN_BLOCKS: Final = {"phi3": _FUSED, "gemma2": _SANDWICHED, "gemma3": _SANDWICHED}
_PERMUTING: Final = ("llama", "smollm3")
_SHIFTED_NORMS: Final = ("gemma2", "gemma3")
_PERMUTED: Final = re.compile(r"model\.layers\.\d+\.self_attn\.([qk])_proj\.(?:weight|bias)")


class HeadCounts(NamedTuple):
    """Attention heads of queries, and of keys and values."""

    query: int
    key_value: int


def hf_name(name: str, architecture: str = "llama") -> str | None:
    """The Hugging Face name of a GGUF tensor; None if ``architecture`` has no such weight.

    ``architecture`` is llama.cpp's name or a ``model_type``, as everywhere here.
    """
    stem, _, suffix = name.rpartition(".")
    if stem in _OUTER:
        return f"{_OUTER[stem]}.{suffix}"
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)", stem)
    names = _block_names(architecture)
    if match is None or match[2] not in names:
        return None
    return f"model.layers.{match[1]}.{names[match[2]]}.{suffix}"


def gguf_name(name: str, architecture: str = "llama") -> str | None:
    """The GGUF name of a Hugging Face weight; None if ``architecture`` has no such weight."""
    stem, _, suffix = name.rpartition(".")
    for gguf, hf in _OUTER.items():
        if stem == hf:
            return f"{gguf}.{suffix}"
    match = re.fullmatch(r"model\.layers\.(\d+)\.([\w.]+)", stem)
    if match is None:
        return None
    for gguf, hf in _block_names(architecture).items():
        if match[2] == hf:
            return f"blk.{match[1]}.{gguf}.{suffix}"
    return None


def to_gguf_layout(name: str, weight: Tensor, architecture: str, heads: HeadCounts) -> Tensor:
    """A weight named as in Hugging Face, in GGUF's order and scale.

    llama.cpp rotates neighbouring features of the llama family (RoPE type NORM), Hugging Face the
    two halves of a head; so the rows of q and k are interleaved. Other families use NEOX as is.
    Gemma's norms multiply by 1 + weight; llama.cpp's by the weight, so it holds the sum.

    Source: ``LlamaModel.permute`` and ``Gemma2Model.modify_tensors`` in llama.cpp's
    convert_hf_to_gguf.py.
    """
    if _is_shifted(name, architecture):
        return weight + 1
    n = _permuted_heads(name, architecture, heads)
    if n is None:
        return weight
    halves = weight.reshape(n, 2, weight.shape[0] // n // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def to_hf_layout(name: str, weight: Tensor, architecture: str, heads: HeadCounts) -> Tensor:
    """The inverse of ``to_gguf_layout``."""
    if _is_shifted(name, architecture):
        return weight - 1
    n = _permuted_heads(name, architecture, heads)
    if n is None:
        return weight
    pairs = weight.reshape(n, weight.shape[0] // n // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def keeps_row_order(name: str, architecture: str) -> bool:
    """Whether both layouts have a weight's rows in the same order."""
    permuting = gguf_architecture(architecture) in _PERMUTING
    return not permuting or _PERMUTED.fullmatch(name) is None


def _block_names(architecture: str) -> dict[str, str]:
    return _OWN_BLOCKS.get(gguf_architecture(architecture), _BLOCK)


def _is_shifted(name: str, architecture: str) -> bool:
    shifted = gguf_architecture(architecture) in _SHIFTED_NORMS
    return shifted and name.endswith(("norm.weight", "layernorm.weight"))


def _permuted_heads(name: str, architecture: str, heads: HeadCounts) -> int | None:
    permuting = gguf_architecture(architecture) in _PERMUTING
    match = _PERMUTED.fullmatch(name) if permuting else None
    if match is None:
        return None
    return heads.query if match[1] == "q" else heads.key_value

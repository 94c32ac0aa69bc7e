"""The model families that SO8T trains and exports: one table for the code and for its reader."""

from typing import Final, NamedTuple

BYTE_LEVEL: Final = "byte-level BPE"
SENTENCEPIECE: Final = "SentencePiece BPE"
FULL: Final = "full_attention"
SLIDING: Final = "sliding_attention"


class Family(NamedTuple):
    """What is known of one ``model_type`` of config.json."""

    title: str
    model_type: str
    hf_class: str
    architecture: str
    """llama.cpp's name (``general.architecture``)."""
    settings: tuple[str, ...]
    """Keys of config.json beyond the common ones whose value is exported or checked."""
    rope_types: tuple[str, ...] = ("default",)
    """RoPE scalings that llama.cpp computes alike (for Gemma 3: of the global layers)."""
    activation: str = "silu"
    biases: bool = False
    """Whether llama.cpp has a place for ``attention_bias`` and ``mlp_bias``."""
    window_period: int | None = None
    """Every so many layers one attends to everything and the others to a window; None: all do."""
    softcapped: bool = False
    tokenizers: tuple[str, ...] = (BYTE_LEVEL, SENTENCEPIECE)
    lora_targets: str = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
    verified: str = "tiny random models"
    """On what live adapter, merged weights, Hugging Face export and GGUF were compared."""
    notes: str = ""

    def layer_types(self, layers: int) -> list[str]:
        """What llama.cpp takes each of ``layers`` layers for, in Hugging Face's words."""
        period = self.window_period
        if period is None:
            return [FULL] * layers
        return [FULL if (i + 1) % period == 0 else SLIDING for i in range(layers)]


_WINDOW_LIMITS_CONTEXT: Final = "sliding_window limits the context: llama.cpp's graph has none"
_NFC: Final = "text that is not in NFC gets other ids: llama.cpp does not normalize"
_TABLE: Final = (
    Family(
        "Llama 2, 3; SmolLM2",
        "llama",
        "LlamaForCausalLM",
        "llama",
        ("attention_bias", "mlp_bias"),
        rope_types=("default", "linear", "llama3"),
        biases=True,
        verified="SmolLM2-135M; tiny random models",
    ),
    Family(
        "Mistral",
        "mistral",
        "MistralForCausalLM",
        "llama",
        ("sliding_window",),
        rope_types=("default", "linear", "llama3"),
        notes=_WINDOW_LIMITS_CONTEXT,
    ),
    Family(
        "Qwen 2, 2.5",
        "qwen2",
        "Qwen2ForCausalLM",
        "qwen2",
        ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),
        rope_types=("default", "linear"),
        tokenizers=(BYTE_LEVEL,),
        notes=_NFC,
    ),
    Family(
        "Qwen 3",
        "qwen3",
        "Qwen3ForCausalLM",
        "qwen3",
        ("layer_types", "max_window_layers", "sliding_window", "use_sliding_window"),
        rope_types=("default", "linear"),
        tokenizers=(BYTE_LEVEL,),
        notes=_NFC,
    ),
    Family(
        "Phi 3, 3.5, 4-mini",
        "phi3",
        "Phi3ForCausalLM",
        "phi3",
        ("original_max_position_embeddings", "partial_rotary_factor", "sliding_window"),
        rope_types=("default", "longrope"),
        lora_targets="qkv_proj o_proj gate_up_proj down_proj",
        notes=f"longrope: short factors, context up to the original one; {_WINDOW_LIMITS_CONTEXT}",
    ),
    Family(
        "Gemma 3 (text)",
        "gemma3_text",
        "Gemma3ForCausalLM",
        "gemma3",
        (
            "_sliding_window_pattern",
            "layer_types",
            "query_pre_attn_scalar",
            "rope_local_base_freq",
            "sliding_window",
            "sliding_window_pattern",
        ),
        rope_types=("default", "linear"),
        activation="gelu_pytorch_tanh",
        window_period=6,
        tokenizers=(SENTENCEPIECE,),
        notes="norm weights + 1; windows in 5 of 6 layers; with images (model_type gemma3): refused",
    ),
    Family(
        "Gemma 2",
        "gemma2",
        "Gemma2ForCausalLM",
        "gemma2",
        (
            "attn_logit_softcapping",
            "final_logit_softcapping",
            "layer_types",
            "query_pre_attn_scalar",
            "sliding_window",
        ),
        activation="gelu_pytorch_tanh",
        window_period=2,
        softcapped=True,
        tokenizers=(SENTENCEPIECE,),
        notes="norm weights + 1; windows in every other layer; softcaps; temperature 1 only",
    ),
    Family(
        "SmolLM3",
        "smollm3",
        "SmolLM3ForCausalLM",
        "smollm3",
        (
            "layer_types",
            "max_window_layers",
            "no_rope_layer_interval",
            "no_rope_layers",
            "sliding_window",
            "use_sliding_window",
        ),
        rope_types=("default", "linear"),
        tokenizers=(BYTE_LEVEL,),
        notes="no RoPE in every fourth layer",
    ),
)
FAMILIES: Final = {family.model_type: family for family in _TABLE}
"""Families by ``model_type``."""


def gguf_architecture(model_type: str) -> str:
    """llama.cpp's architecture of a ``model_type``; a name that is no family's is returned as is."""
    family = FAMILIES.get(model_type)
    return model_type if family is None else family.architecture

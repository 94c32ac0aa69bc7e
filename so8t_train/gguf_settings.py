"""What of a config.json a GGUF can express: exported, known to change nothing, or refused."""

from pathlib import Path
from typing import Any, Final

from gguf import GGUFWriter

from so8t_eval.errors import ExportError
from so8t_train.base_model import load_base_config
from so8t_train.base_weights import BaseWeights
from so8t_train.families import FAMILIES, Family
from so8t_train.gguf_rope import (
    Settings,
    add_rope,
    check_rope,
    head_size,
    original_context,
)

_COMMON: Final = frozenset(
    """
    head_dim hidden_act hidden_activation hidden_size intermediate_size
    max_position_embeddings model_type num_attention_heads num_hidden_layers
    num_key_value_heads rms_norm_eps rope_parameters rope_scaling rope_theta
    tie_word_embeddings vocab_size
    """.split()  # noqa: SIM905
)
_CHANGES_NOTHING: Final = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _name_or_path architectures
    attention_dropout attn_implementation auto_map bos_token_id cache_implementation dtype
    embd_pdrop eos_token_id hidden_dropout initializer_range is_llama_config pad_token_id
    pretraining_tp resid_pdrop torch_dtype transformers.js_config transformers_version
    unsloth_fixed unsloth_version use_cache
    """.split()  # noqa: SIM905
)
_NO_CHANGE: Final[tuple[object, ...]] = (None, False, 0, "", [], {})
_LARGEST: Final = {"gemma2": 46, "gemma3_text": 62}
"""Layers of the 27B models, whose attention llama.cpp scales by hidden size / heads."""


def settings_of(base: BaseWeights) -> Settings:
    """The configuration of a Hugging Face base as transformers runs it, checked.

    Raises:
        ExportError: naming the setting that llama.cpp would compute otherwise, or does not know.
    """
    where = base.source.path / "config.json"
    family = FAMILIES.get(base.config.get("model_type", ""))
    if family is None:
        raise ExportError(
            f"{where}: expected model_type among {', '.join(FAMILIES)} for GGUF, found "
            f"{base.config.get('model_type')!r}; export with --format hf and convert with llama.cpp"
        )
    settings: Settings = load_base_config(base.source).to_dict()
    _check_unknown(family, base.config, where)
    _check_values(family, settings, where)
    check_rope(family, settings, where)
    return settings


def add_settings(writer: GGUFWriter, settings: Settings) -> None:
    """Write the keys of the architecture."""
    queries = int(settings["num_attention_heads"])
    size = head_size(settings)
    writer.add_context_length(context_length(settings))
    writer.add_embedding_length(int(settings["hidden_size"]))
    writer.add_block_count(int(settings["num_hidden_layers"]))
    writer.add_feed_forward_length(int(settings["intermediate_size"]))
    writer.add_head_count(queries)
    writer.add_head_count_kv(int(settings.get("num_key_value_heads") or queries))
    writer.add_layer_norm_rms_eps(float(settings["rms_norm_eps"]))
    writer.add_key_length(size)
    writer.add_value_length(size)
    add_rope(writer, settings)
    family = FAMILIES[settings["model_type"]]
    if family.window_period is not None:
        writer.add_sliding_window(int(settings["sliding_window"]))
    if family.softcapped:
        writer.add_attn_logit_softcapping(float(settings["attn_logit_softcapping"]))
        writer.add_final_logit_softcapping(float(settings["final_logit_softcapping"]))


def context_length(settings: Settings) -> int:
    """Tokens up to which llama.cpp computes the same model.

    Within a sliding window every token sees all before it; where llama.cpp has no window for the
    architecture, that is where its model and Hugging Face's part.
    """
    limits = [int(settings["max_position_embeddings"]), original_context(settings)]
    if settings["model_type"] in ("mistral", "phi3"):
        limits.append(settings.get("sliding_window"))
    return min(int(limit) for limit in limits if limit)


def _check_unknown(family: Family, config: dict[str, Any], where: Path) -> None:
    known = _COMMON | _CHANGES_NOTHING | set(family.settings)
    for key, value in config.items():
        if key not in known and value not in _NO_CHANGE:
            raise ExportError(
                f"{where}: {key} = {str(value)[:80]!r} is not known for {family.model_type}, and a "
                "GGUF without it could be another model; export with --format hf"
            )


def _check_values(family: Family, settings: Settings, where: Path) -> None:
    layers = int(settings["num_hidden_layers"])
    expected: dict[str, object] = {
        "use_sliding_window": False,
        "layer_types": family.layer_types(layers),
    }
    activation = "hidden_activation" if "hidden_activation" in settings else "hidden_act"
    expected[activation] = family.activation
    if not family.biases:
        expected |= {"attention_bias": False, "mlp_bias": False}
    if family.model_type == "smollm3":
        expected["no_rope_layers"] = [int((i + 1) % 4 != 0) for i in range(layers)]
    if family.window_period is not None:
        expected["query_pre_attn_scalar"] = _attention_scale_base(family, settings)
    if not family.softcapped:
        expected |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    for key, value in expected.items():
        found = settings.get(key)
        if found is not None and found != value:
            raise ExportError(
                f"{where}: {key} = {str(found)[:120]} is not supported, llama.cpp computes "
                f"{family.model_type} with {str(value)[:120]}; export with --format hf"
            )
    needed = ["sliding_window"] if family.window_period is not None else []
    if family.softcapped:
        needed += ["attn_logit_softcapping", "final_logit_softcapping"]
    for key in needed:
        if not settings.get(key):
            raise ExportError(
                f"{where}: expected a number for {key}, found {settings.get(key)!r}, which "
                "llama.cpp cannot be told; export with --format hf"
            )


def _attention_scale_base(family: Family, settings: Settings) -> float:
    """Whose inverse square root llama.cpp scales Gemma's attention scores by."""
    if int(settings["num_hidden_layers"]) == _LARGEST[family.model_type]:
        return float(settings["hidden_size"] / settings["num_attention_heads"])
    return head_size(settings)

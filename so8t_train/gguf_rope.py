"""Rotary position embeddings of a Hugging Face configuration, as llama.cpp takes them."""

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
from gguf import GGUFWriter, RopeScalingType

from so8t_eval.errors import ExportError
from so8t_train.families import FULL, SLIDING, Family

Settings = dict[str, Any]
"""A transformers configuration as a dictionary, every default filled in."""
_LOCAL_THETA: Final = 10000.0
"""What llama.cpp takes for Gemma 3's windowed layers, whatever an older version is told."""
_KNOWN: Final = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "high_freq_factor",
        "low_freq_factor",
        "original_max_position_embeddings",
    ),
    "longrope": (
        "attention_factor",
        "factor",
        "long_factor",
        "original_max_position_embeddings",
        "short_factor",
    ),
}


def check_rope(family: Family, settings: Settings, where: Path) -> None:
    """Refuse what llama.cpp would rotate in another way.

    Raises:
        ExportError: naming the setting.
    """
    rope = settings.get("rope_parameters") or {}
    if FULL in rope or SLIDING in rope:
        _check_local(rope.get(SLIDING) or {}, where)
    rope = rope_of(settings)
    kind = rope_type(rope)
    if kind not in family.rope_types:
        raise ExportError(
            f"{where}: expected a rope_type among {', '.join(family.rope_types)} for "
            f"{family.model_type}, found rope_scaling (rope_parameters) {rope!r}; export with "
            "--format hf"
        )
    common = ("partial_rotary_factor", "rope_theta", "rope_type", "type")
    unknown = [k for k, v in rope.items() if v is not None and k not in (*common, *_KNOWN[kind])]
    if unknown:
        raise ExportError(
            f"{where}: rope_parameters.{unknown[0]} = {rope[unknown[0]]!r} is not known for "
            f"rope_type {kind}; export with --format hf"
        )
    if family.model_type != "phi3" and rope.get("partial_rotary_factor") not in (None, 1, 1.0):
        raise ExportError(
            f"{where}: rope_parameters.partial_rotary_factor = {rope['partial_rotary_factor']!r} is "
            f"not supported for {family.model_type}; export with --format hf"
        )


def add_rope(writer: GGUFWriter, settings: Settings) -> None:
    """Write base, size and scaling."""
    rope = rope_of(settings)
    writer.add_rope_dimension_count(_rotated_size(settings))
    writer.add_rope_freq_base(_theta(settings))
    if rope_type(rope) == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))
    elif rope_type(rope) == "longrope":
        writer.add_rope_scaling_orig_ctx_len(int(rope["original_max_position_embeddings"]))
        writer.add_rope_scaling_attn_factors(_attention_factor(settings))


def rope_tensors(settings: Settings) -> dict[str, npt.NDArray[np.float32]]:
    """Per-frequency divisors (rotated size / 2,) by tensor name; empty where there are none.

    A longrope model has other factors for short and for long texts, and runtimes choose by the
    size of the context they opened, so that verdicts would depend on it. The file is made for
    texts up to the original context, and has the short ones in both places.
    """
    rope = rope_of(settings)
    if rope_type(rope) == "longrope":
        short = np.array(rope["short_factor"], dtype=np.float32)
        return {"rope_factors_long.weight": short, "rope_factors_short.weight": short}
    if rope_type(rope) == "llama3":
        return {"rope_freqs.weight": _llama3_factors(settings)}
    return {}


def original_context(settings: Settings) -> int | None:
    """Tokens up to which the short factors of a longrope model hold; None for others."""
    rope = rope_of(settings)
    is_long = rope_type(rope) == "longrope"
    return int(rope["original_max_position_embeddings"]) if is_long else None


def rope_of(settings: Settings) -> dict[str, Any]:
    """RoPE settings, of the global layers where there are two kinds."""
    rope: dict[str, Any] = settings.get("rope_parameters") or {}
    return dict(rope.get(FULL) or {}) if FULL in rope else rope


def rope_type(rope: dict[str, Any]) -> str:
    """Kind of scaling; ``default`` is none."""
    return str(rope.get("rope_type") or rope.get("type") or "default")


def head_size(settings: Settings) -> int:
    """Features of one attention head."""
    own = settings.get("head_dim")
    return int(own or settings["hidden_size"] // settings["num_attention_heads"])


def _check_local(rope: dict[str, Any], where: Path) -> None:
    theta = float(rope.get("rope_theta", _LOCAL_THETA))
    if rope_type(rope) != "default" or theta != _LOCAL_THETA:
        raise ExportError(
            f"{where}: expected rope_parameters.{SLIDING} of rope_type default and rope_theta "
            f"{_LOCAL_THETA:.0f}, which llama.cpp assumes, found {rope!r}; export with --format hf"
        )


def _theta(settings: Settings) -> float:
    return float(rope_of(settings).get("rope_theta") or settings.get("rope_theta") or 10000.0)


def _rotated_size(settings: Settings) -> int:
    share = float(rope_of(settings).get("partial_rotary_factor") or 1.0)
    return int(head_size(settings) * share)


def _attention_factor(settings: Settings) -> float:
    """Source: ``_compute_longrope_parameters`` in transformers' modeling_rope_utils.py."""
    rope = rope_of(settings)
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    original = float(rope["original_max_position_embeddings"])
    factor = float(rope.get("factor") or settings["max_position_embeddings"] / original)
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def _llama3_factors(settings: Settings) -> npt.NDArray[np.float32]:
    """Source: ``_compute_llama3_parameters`` in transformers' modeling_rope_utils.py."""
    rope = rope_of(settings)
    factor, original = float(rope["factor"]), float(rope["original_max_position_embeddings"])
    low, high = float(rope["low_freq_factor"]), float(rope["high_freq_factor"])
    size = head_size(settings)
    frequencies = _theta(settings) ** -(np.arange(0, size, 2, dtype=np.float64) / size)
    turns = original * frequencies / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    factors: npt.NDArray[np.float32] = (1 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors

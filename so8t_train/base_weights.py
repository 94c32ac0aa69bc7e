"""The float weights of a base model by their Hugging Face names, from GGUF or safetensors."""

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from so8t_eval.errors import ExportError, ModelFileError
from so8t_train.base_model import BaseModelSource, open_gguf
from so8t_train.gguf_layout import ARCHITECTURES, HeadCounts, hf_name, to_hf_layout

EMBEDDING: Final = "model.embed_tokens.weight"
OUTPUT: Final = "lm_head.weight"


class BaseWeights(NamedTuple):
    """A base in memory. ``weights`` are float32 in Hugging Face's layout, in file order.

    ``reader`` is the open GGUF file, ``config`` the decoded config.json: one of the two is set.
    """

    source: BaseModelSource
    weights: dict[str, Tensor]
    architecture: str
    heads: HeadCounts
    tied: bool
    reader: GGUFReader | None
    config: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix, padding included."""
        return int(self.weights[EMBEDDING].shape[0])


def read_base_weights(source: BaseModelSource) -> BaseWeights:
    """Read every weight of a base model.

    Raises:
        ModelFileError: files are broken.
        ExportError: the base has weights this exporter cannot name.
    """
    base = _from_gguf(source) if source.is_gguf else _from_directory(source)
    wanted = (EMBEDDING,) if base.tied else (EMBEDDING, OUTPUT)
    for name in wanted:
        if name not in base.weights:
            raise ExportError(
                f"{source.path} has no weight {name}; this architecture is unsupported"
            )
    return base


def linear_names(base: BaseWeights) -> list[str]:
    """Module names of all linear layers but the output matrix: those held in 8-bit."""
    return [
        name.removesuffix(".weight")
        for name, weight in base.weights.items()
        if weight.dim() == 2 and name not in (EMBEDDING, OUTPUT)
    ]


def dequant8(weight: Tensor) -> Tensor:
    """``weight`` (out, in) after LLM.int8 row-wise quantization and back, float32.

    The same kernel and the same rounding to float16 before it as in ``bitsandbytes.Linear8bitLt``.
    """
    import bitsandbytes as bnb

    codes, row_maxima, _ = bnb.functional.int8_vectorwise_quant(weight.half().contiguous())
    scaled: Tensor = codes.float() * (row_maxima.float() / 127.0).unsqueeze(1)
    return scaled


def _from_gguf(source: BaseModelSource) -> BaseWeights:
    reader = open_gguf(source.path)
    architecture = str(reader.fields["general.architecture"].contents())
    if architecture not in ARCHITECTURES:
        raise ExportError(
            f"{source.path}: expected an architecture among {', '.join(ARCHITECTURES)}, found "
            f"{architecture!r}; choose another base_model"
        )
    queries = int(reader.fields[f"{architecture}.attention.head_count"].contents())
    grouped = reader.fields.get(f"{architecture}.attention.head_count_kv")
    heads = HeadCounts(queries, int(grouped.contents()) if grouped is not None else queries)
    weights: dict[str, Tensor] = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        if name is not None:
            values = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
            weights[name] = to_hf_layout(name, torch.from_numpy(values), architecture, heads)
    return BaseWeights(source, weights, architecture, heads, OUTPUT not in weights, reader, {})


def _from_directory(source: BaseModelSource) -> BaseWeights:
    weights: dict[str, Tensor] = {}
    for file in sorted(source.path.glob("*.safetensors")):
        try:
            shard: dict[str, Tensor] = load_file(file)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"{file} is broken or truncated ({error}); fetch it again"
            ) from error
        weights |= {name: weight.float() for name, weight in shard.items()}
    config = _read_config(source.path / "config.json")
    queries = int(config.get("num_attention_heads", 0))
    heads = HeadCounts(queries, int(config.get("num_key_value_heads") or queries))
    tied = bool(config.get("tie_word_embeddings", OUTPUT not in weights))
    if tied:
        weights.pop(OUTPUT, None)
    return BaseWeights(source, weights, str(config.get("model_type")), heads, tied, None, config)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}; fetch it again") from error
    return value

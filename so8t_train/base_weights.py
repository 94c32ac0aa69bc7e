"""The float weights of a base model by their Hugging Face names, from GGUF or safetensors."""

import json
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import torch
from gguf import GGUFReader, ReaderTensor
from gguf.quants import dequantize
from safetensors import SafetensorError, safe_open
from torch import Tensor

from so8t_eval.errors import ExportError, ModelFileError
from so8t_train.base_model import BaseModelSource, open_gguf
from so8t_train.gguf_layout import (
    ARCHITECTURES,
    HeadCounts,
    hf_name,
    keeps_row_order,
    to_hf_layout,
)
from so8t_train.lazy_weights import LazyWeights, Shape

EMBEDDING: Final = "model.embed_tokens.weight"
OUTPUT: Final = "lm_head.weight"


class BaseWeights(NamedTuple):
    """An open base. ``weights`` are float32 in Hugging Face's layout, in file order, read lazily.

    ``reader`` is the open GGUF file, ``config`` the decoded config.json: one of the two is set.
    """

    source: BaseModelSource
    weights: LazyWeights
    architecture: str
    heads: HeadCounts
    tied: bool
    reader: GGUFReader | None
    config: dict[str, Any]

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding matrix, padding included."""
        return self.weights.shapes[EMBEDDING][0]


def read_base_weights(source: BaseModelSource) -> BaseWeights:
    """Open a base model: which weights it has and of which shape; none is read yet.

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
    """Module names of all linear layers but the output matrix: those held in 8-bit or 4-bit."""
    return [
        name.removesuffix(".weight")
        for name, shape in base.weights.shapes.items()
        if len(shape) == 2 and name not in (EMBEDDING, OUTPUT)
    ]


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
    weights = _lazy_gguf(source.path, reader, architecture, heads)
    return BaseWeights(source, weights, architecture, heads, OUTPUT not in weights, reader, {})


def _lazy_gguf(path: Path, reader: GGUFReader, architecture: str, heads: HeadCounts) -> LazyWeights:
    """Read by file position: the reader's own view would keep every page it has touched."""
    tensors: dict[str, ReaderTensor] = {}
    for tensor in reader.tensors:
        name = hf_name(tensor.name)
        if name is not None:
            tensors[name] = tensor
    shapes = {name: tuple(map(int, reversed(item.shape))) for name, item in tensors.items()}

    def read(name: str, start: int, stop: int) -> Tensor:
        if keeps_row_order(name, architecture):
            return dequantized(name, start, stop)
        whole = dequantized(name, 0, shapes[name][0])
        return to_hf_layout(name, whole, architecture, heads)[start:stop]

    def dequantized(name: str, start: int, stop: int) -> Tensor:
        tensor, (rows, *_) = tensors[name], shapes[name]
        width = int(tensor.n_bytes) // rows
        stored = np.fromfile(
            path, np.uint8, (stop - start) * width, offset=int(tensor.data_offset) + start * width
        )
        if len(shapes[name]) > 1:
            stored = stored.reshape(stop - start, width)
        values = np.array(dequantize(stored, tensor.tensor_type), dtype=np.float32)
        return torch.from_numpy(values)

    return LazyWeights(shapes, read)


def _from_directory(source: BaseModelSource) -> BaseWeights:
    weights = _lazy_safetensors(sorted(source.path.glob("*.safetensors")))
    config = _read_config(source.path / "config.json")
    queries = int(config.get("num_attention_heads", 0))
    heads = HeadCounts(queries, int(config.get("num_key_value_heads") or queries))
    tied = bool(config.get("tie_word_embeddings", OUTPUT not in weights))
    if tied:
        weights.shapes.pop(OUTPUT, None)
    return BaseWeights(source, weights, str(config.get("model_type")), heads, tied, None, config)


def _lazy_safetensors(shards: list[Path]) -> LazyWeights:
    """A shard is opened for each read: it is mapped, and its pages count as ours until closed."""
    places: dict[str, Path] = {}
    shapes: dict[str, Shape] = {}
    for file in shards:
        try:
            with safe_open(file, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - it is no mapping
                    places[name] = file
                    shapes[name] = tuple(shard.get_slice(name).get_shape()) or (1,)
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"{file} is broken or truncated ({error}); fetch it again"
            ) from error

    def read(name: str, start: int, stop: int) -> Tensor:
        with safe_open(places[name], framework="pt") as shard:
            part: Tensor = shard.get_slice(name)[start:stop]
            return part.to(torch.float32, copy=True)

    return LazyWeights(shapes, read)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read: {error}; fetch it again") from error
    return value

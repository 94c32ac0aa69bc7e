"""Sizes of a base model's weights, read from its headers alone: no weights are loaded or hashed."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from safetensors import SafetensorError, safe_open

from so8t_eval.errors import ModelFileError
from so8t_train.base_model import (
    EMBEDDED,
    BaseModelSource,
    load_base_config,
    open_gguf,
    resolve_base,
)
from so8t_train.embedded_base import embedded_base_path
from so8t_train.gguf_layout import hf_name

_LAYER: Final = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)\.weight$")
_ADDED: Final = re.compile(r"\.(?:lora_\w+|rotation_gate)\.")
_EMBEDDING: Final = "embed_tokens.weight"
_OUTPUT: Final = "lm_head.weight"


class LinearShape(NamedTuple):
    """A linear layer inside the decoder, ``name`` as in ``lora_target_modules``."""

    name: str
    n_out: int
    n_in: int

    @property
    def parameters(self) -> int:
        """Numbers in its weight."""
        return self.n_out * self.n_in


class ModelShape(NamedTuple):
    """What memory and time depend on; widths in features, sizes in numbers unless named bytes."""

    layers: int
    hidden: int
    query_width: int
    """Heads times head size."""
    key_width: int
    """Key-value heads times head size; values have the same."""
    intermediate: int
    vocabulary: int
    """Rows of the embedding matrix."""
    tied: bool
    linears: tuple[LinearShape, ...]
    """Of all decoder layers."""
    norms_per_layer: float
    """Normalizations of the whole hidden state per decoder layer."""
    head_norms: bool
    """Queries and keys are normalized head by head."""
    file_bytes: int
    is_gguf: bool

    @property
    def linear_parameters(self) -> int:
        """Numbers in the decoder's linear layers: what 8-bit and 4-bit shrink."""
        return sum(linear.parameters for linear in self.linears)

    @property
    def embedding_parameters(self) -> int:
        """Numbers in the embedding matrix, and in the output matrix if that is another."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """Numbers in all matrices; norms and biases are too few to matter."""
        return self.linear_parameters + self.embedding_parameters


def locate_base(name: str) -> BaseModelSource:
    """A base model's files like ``resolve_base``, without its hash, which reads every byte.

    Raises:
        ConfigError, ModelFileError: as ``resolve_base``; a hub id is fetched as a fit would.
    """
    path = embedded_base_path() if name == EMBEDDED else Path(name).expanduser()
    if path.is_file() and path.suffix == ".gguf":
        return BaseModelSource(name, path, True, "")
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return BaseModelSource(name, path, False, "")
    return resolve_base(name)


def read_shape(source: BaseModelSource, trust_remote_code: bool = False) -> ModelShape:
    """The sizes of a base model.

    Raises:
        ModelFileError: a header is broken, or tells of no decoder layers or embedding matrix.
    """
    config = load_base_config(source, trust_remote_code)
    tensors = dict(_gguf_tensors(source.path) if source.is_gguf else _hf_tensors(source.path))
    return _shape(source, config, tensors)


def loaded_shape(source: BaseModelSource, model: Any) -> ModelShape:
    """``read_shape`` of a transformers ``model`` in memory, adapters and gates inside or not."""
    tensors = {
        name.replace(".base_layer.", "."): _unpacked_shape(parameter)
        for name, parameter in model.named_parameters()
        if not _ADDED.search(name)
    }
    return _shape(source, model.config, tensors)


def _unpacked_shape(parameter: Any) -> tuple[int, ...]:
    """Of the matrix that a parameter stands for: a 4-bit weight is a column of packed codes."""
    state = getattr(parameter, "quant_state", None)
    return tuple(parameter.shape if state is None else state.shape)


def _shape(
    source: BaseModelSource, config: Any, tensors: Mapping[str, tuple[int, ...]]
) -> ModelShape:
    inside = {name: (match, tensors[name]) for name in tensors if (match := _LAYER.search(name))}
    linears = tuple(
        LinearShape(match[2].rpartition(".")[2], shape[0], shape[1])
        for match, shape in inside.values()
        if len(shape) == 2
    )
    embedding = next((s for name, s in tensors.items() if name.endswith(_EMBEDDING)), None)
    if not linears or embedding is None:
        raise ModelFileError(
            f"{source.path}: expected an embedding matrix and linear layers in numbered decoder "
            "layers, found none; choose another base_model"
        )
    hidden = embedding[1]
    layers = len({match[1] for match, _ in inside.values()})
    heads = int(config.num_attention_heads)
    size = int(getattr(config, "head_dim", None) or hidden // heads)
    norms = [shape for match, shape in inside.values() if len(shape) == 1 and "norm" in match[2]]
    return ModelShape(
        layers=layers,
        hidden=hidden,
        query_width=heads * size,
        key_width=int(getattr(config, "num_key_value_heads", None) or heads) * size,
        intermediate=_intermediate(config, linears, hidden),
        vocabulary=embedding[0],
        tied=not any(name.endswith(_OUTPUT) for name in tensors)
        or bool(getattr(config, "tie_word_embeddings", False)),
        linears=linears,
        norms_per_layer=sum(shape == (hidden,) for shape in norms) / layers,
        head_norms=any(match[2].endswith("q_norm") for match, _ in inside.values()),
        file_bytes=sum(file.stat().st_size for file in _weight_files(source)),
        is_gguf=source.is_gguf,
    )


def _intermediate(config: Any, linears: tuple[LinearShape, ...], hidden: int) -> int:
    down = [linear.n_in for linear in linears if linear.name == "down_proj"]
    return max(down) if down else int(getattr(config, "intermediate_size", 4 * hidden))


def _weight_files(source: BaseModelSource) -> list[Path]:
    return [source.path] if source.is_gguf else sorted(source.path.glob("*.safetensors"))


def _gguf_tensors(path: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    reader = open_gguf(path)
    architecture = str(reader.fields["general.architecture"].contents())
    for tensor in reader.tensors:
        name = hf_name(tensor.name, architecture)
        if name is not None:
            yield name, tuple(int(n) for n in reversed(tensor.shape))


def _hf_tensors(directory: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    for file in sorted(directory.glob("*.safetensors")):
        try:
            with safe_open(file, "np") as weights:
                for name in weights.keys():  # noqa: SIM118 - no mapping
                    yield name, tuple(weights.get_slice(name).get_shape())
        except (SafetensorError, OSError) as error:
            raise ModelFileError(
                f"{file} is broken or truncated ({error}); fetch it again"
            ) from error

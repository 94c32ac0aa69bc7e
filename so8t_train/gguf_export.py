"""Write merged weights as a float GGUF file that any llama.cpp program runs."""

import errno
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from gguf.quants import quantize
from torch import Tensor

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.errors import DiskError, ExportError
from so8t_train.base_weights import BaseWeights
from so8t_train.families import gguf_architecture
from so8t_train.gguf_layout import gguf_name, hf_name, to_gguf_layout
from so8t_train.gguf_metadata import (
    So8tMetadata,
    add_file_type,
    add_so8t_keys,
    copy_metadata,
    make_metadata,
)
from so8t_train.gguf_rope import rope_tensors
from so8t_train.gguf_settings import settings_of
from so8t_train.merged_model import OpenRun
from so8t_train.vocabulary_check import check_vocabulary

FloatKind: TypeAlias = Literal["f32", "f16", "bf16"]
_FILE_TYPES: Final = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
}


def write_gguf(
    path: Path,
    run: OpenRun,
    weights: Mapping[str, Tensor],
    kind: FloatKind,
    keys: So8tMetadata,
) -> None:
    """Write ``weights`` (by Hugging Face name) with the base's metadata; norms and biases are F32.

    Raises:
        ExportError: a weight has no place in the architecture, or does not fit the number format.
        DiskError: the file could not be written; what was written is removed.
    """
    writer = GGUFWriter(path, gguf_architecture(run.base.architecture))
    if run.base.reader is not None:
        copy_metadata(writer, run.base.reader, run.base.architecture)
    else:
        make_metadata(writer, run.base, run.tokenizer)
    add_file_type(writer, _FILE_TYPES[kind])
    add_so8t_keys(writer, keys)
    for name, tensor in _tensors(run.base, weights):
        _add_tensor(writer, name, tensor, kind)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.flush()
        sync_file(path)
    except OSError as error:
        _close(writer)
        path.unlink(missing_ok=True)
        raise disk_error(path, error) from error
    writer.close()


def check_gguf_base(base: BaseWeights, tokenizer: HfTokenizer) -> None:
    """Make the metadata once for nothing, so that an unsupported base is told of at the start.

    Raises:
        ExportError: as ``write_gguf``.
    """
    if base.reader is None:
        architecture = gguf_architecture(base.architecture)
        make_metadata(GGUFWriter(None, architecture), base, tokenizer)
        check_vocabulary(
            lambda path: _write_vocabulary(path, architecture, base, tokenizer),
            tokenizer,
            base.source.path / "tokenizer.json",
        )


def fits_f16(weights: Mapping[str, Tensor]) -> bool:
    """Whether every weight is within float16's range."""
    top = torch.finfo(torch.float16).max
    return all(float(weight.abs().max()) <= top for weight in weights.values())


def disk_error(path: Path, error: OSError) -> DiskError:
    """The failed write as an error that says what to do."""
    # numpy reports a short write, which is what a full disk gives it, without a number.
    full = error.errno in (None, errno.ENOSPC, errno.EFBIG, errno.EDQUOT)
    hint = "; free space or choose another -o" if full else ""
    return DiskError(f"cannot write {path}: {error.strerror or error}{hint}")


def _write_vocabulary(
    path: Path, architecture: str, base: BaseWeights, tokenizer: HfTokenizer
) -> None:
    writer = GGUFWriter(path, architecture)
    make_metadata(writer, base, tokenizer)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
    finally:
        _close(writer)


def _tensors(base: BaseWeights, weights: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """GGUF names and tensors in GGUF's layout: a GGUF base's own order, else the weights'."""
    if base.reader is None:
        for name, factors in rope_tensors(settings_of(base)).items():
            yield name, torch.from_numpy(factors)
        for name, weight in weights.items():
            own = gguf_name(name, base.architecture)
            if own is None:
                raise ExportError(f"{base.source.path}: {name} has no place in {base.architecture}")
            yield own, to_gguf_layout(name, weight, base.architecture, base.heads)
        return
    for tensor in base.reader.tensors:
        known = hf_name(tensor.name, base.architecture)
        if known is not None:
            yield tensor.name, to_gguf_layout(known, weights[known], base.architecture, base.heads)
        elif tensor.tensor_type == GGMLQuantizationType.F32:  # such as rope_freqs: not a weight
            yield tensor.name, torch.from_numpy(np.array(tensor.data))
        else:
            raise ExportError(
                f"{base.source.path}: unknown tensor {tensor.name}; choose another base"
            )


def _add_tensor(writer: GGUFWriter, name: str, tensor: Tensor, kind: FloatKind) -> None:
    values: npt.NDArray[np.float32] = tensor.contiguous().numpy()
    if not np.isfinite(values).all():
        raise ExportError(f"{name} holds values that are not finite; train again")
    if kind == "f32" or values.ndim == 1:
        writer.add_tensor(name, values)
    elif kind == "f16":
        if np.abs(values).max() > np.finfo(np.float16).max:
            raise ExportError(f"{name} is beyond float16's range; export with --quant bf16 or f32")
        writer.add_tensor(name, values.astype(np.float16))
    else:
        bf16 = GGMLQuantizationType.BF16
        writer.add_tensor(name, quantize(values, bf16), raw_dtype=bf16)


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk, where a full one shows at the latest."""
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


def _close(writer: GGUFWriter) -> None:
    """Close after a failed write: closing flushes, and fails once more."""
    for stream in writer.fout or []:
        try:
            stream.close()
        except OSError:
            continue

"""Write merged weights as a float GGUF file that any llama.cpp program runs."""

import errno
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGMLQuantizationType, GGUFWriter, LlamaFileType
from torch import Tensor

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.errors import DiskError, ExportError
from so8t_train.base_weights import BaseWeights
from so8t_train.families import gguf_architecture
from so8t_train.gguf_layout import gguf_name, hf_name, keeps_row_order, to_gguf_layout
from so8t_train.gguf_metadata import (
    So8tMetadata,
    add_file_type,
    add_so8t_keys,
    copy_metadata,
    make_metadata,
)
from so8t_train.gguf_rope import rope_tensors
from so8t_train.gguf_settings import settings_of
from so8t_train.lazy_weights import Shape, row_blocks, rows_of, shape_of
from so8t_train.merged_model import OpenRun
from so8t_train.vocabulary_check import check_vocabulary

FloatKind: TypeAlias = Literal["f32", "f16", "bf16"]
Progress: TypeAlias = Callable[[float], None]
_FILE_TYPES: Final = {
    "f32": LlamaFileType.ALL_F32,
    "f16": LlamaFileType.MOSTLY_F16,
    "bf16": LlamaFileType.MOSTLY_BF16,
}
_STORED: Final = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_GGUF: Final = {
    torch.float32: GGMLQuantizationType.F32,
    torch.float16: GGMLQuantizationType.F16,
    torch.bfloat16: GGMLQuantizationType.BF16,
}


class Float16RangeError(ExportError):
    """A weight is too large for float16."""


class _PlannedTensor(NamedTuple):
    """A tensor of the file; ``blocks`` makes its rows in order, float32."""

    name: str
    shape: Shape
    blocks: Callable[[], Iterator[Tensor]]

    @property
    def size(self) -> int:
        return math.prod(self.shape)


def write_gguf(
    path: Path,
    run: OpenRun,
    weights: Mapping[str, Tensor],
    kind: FloatKind,
    keys: So8tMetadata,
    *,
    progress: Progress = lambda _share: None,
    synced: bool = True,
) -> None:
    """Write ``weights`` (by Hugging Face name) with the base's metadata; norms and biases are F32.

    One block of rows is in memory at a time. ``progress`` is told the share that is written. Returns
    when the file is on the disk, or, not ``synced``, when the system has it.

    Raises:
        ExportError: a weight has no place in the architecture, or is not finite.
        Float16RangeError: a weight does not fit ``f16``.
        DiskError: the file could not be written; what was written is removed.
    """
    writer = GGUFWriter(path, gguf_architecture(run.base.architecture))
    if run.base.reader is not None:
        copy_metadata(writer, run.base.reader, run.base.architecture)
    else:
        make_metadata(writer, run.base, run.tokenizer)
    add_file_type(writer, _FILE_TYPES[kind])
    add_so8t_keys(writer, keys)
    tensors = list(_tensors(run.base, weights))
    for tensor in tensors:
        stored = _stored_type(tensor, kind)
        writer.add_tensor_info(
            tensor.name,
            tensor.shape,
            np.dtype(np.float32),
            tensor.size * stored.itemsize,
            _GGUF[stored],
        )
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _write_data(writer, tensors, kind, progress)
        writer.flush()
        if synced:
            sync_file(path)
    except BaseException as error:
        _close(writer)
        path.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_error(path, error) from error
        raise
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


def _tensors(base: BaseWeights, weights: Mapping[str, Tensor]) -> Iterator[_PlannedTensor]:
    """Tensors of the file: a GGUF base's own order, else the weights'."""
    if base.reader is None:
        for name, factors in rope_tensors(settings_of(base)).items():
            yield _constant(name, factors)
        for name in weights:
            own = gguf_name(name, base.architecture)
            if own is None:
                raise ExportError(f"{base.source.path}: {name} has no place in {base.architecture}")
            yield _planned(own, name, base, weights)
        return
    for tensor in base.reader.tensors:
        known = hf_name(tensor.name, base.architecture)
        if known is not None:
            yield _planned(tensor.name, known, base, weights)
        elif tensor.tensor_type == GGMLQuantizationType.F32:  # such as rope_freqs: not a weight
            yield _constant(tensor.name, np.array(tensor.data))
        else:
            raise ExportError(
                f"{base.source.path}: unknown tensor {tensor.name}; choose another base"
            )


def _constant(name: str, values: npt.NDArray[np.float32]) -> _PlannedTensor:
    return _PlannedTensor(name, values.shape, lambda: iter((torch.from_numpy(values),)))


def _planned(
    own: str, name: str, base: BaseWeights, weights: Mapping[str, Tensor]
) -> _PlannedTensor:
    """One weight under its GGUF name and in GGUF's layout."""
    shape = shape_of(weights, name)
    in_order = keeps_row_order(name, base.architecture)

    def blocks() -> Iterator[Tensor]:
        for start, stop in row_blocks(shape) if in_order else [(0, shape[0])]:
            rows = rows_of(weights, name, start, stop)
            yield to_gguf_layout(name, rows, base.architecture, base.heads)

    return _PlannedTensor(own, shape, blocks)


def _write_data(
    writer: GGUFWriter, tensors: list[_PlannedTensor], kind: FloatKind, progress: Progress
) -> None:
    """Write every tensor block by block; gguf's own writer takes whole tensors only."""
    stream = (writer.fout or [])[0]
    writer.write_padding(stream, stream.tell())
    total, done = sum(tensor.size for tensor in tensors), 0
    for tensor in tensors:
        stored = _stored_type(tensor, kind)
        for block in tensor.blocks():
            _check_range(tensor.name, block, stored)
            values = block.to(stored).contiguous()
            stream.write(values.view(torch.uint8).numpy().data)
            done += block.numel()
            progress(done / total)
        writer.write_padding(stream, tensor.size * stored.itemsize)


def _check_range(name: str, block: Tensor, stored: torch.dtype) -> None:
    ends = torch.stack(block.aminmax()).abs()
    if not ends.isfinite().all():
        raise ExportError(f"{name} holds values that are not finite; train again")
    if stored == torch.float16 and ends.max() > torch.finfo(torch.float16).max:
        raise Float16RangeError(
            f"{name} is beyond float16's range; export with --quant bf16 or f32"
        )


def _stored_type(tensor: _PlannedTensor, kind: FloatKind) -> torch.dtype:
    return torch.float32 if len(tensor.shape) == 1 else _STORED[kind]


def sync_file(path: Path) -> None:
    """Wait until a file is on the disk, where a full one shows at the latest.

    Raises:
        DiskError: it cannot be written there.
    """
    try:
        with path.open("rb+") as stream:
            os.fsync(stream.fileno())
    except OSError as error:
        raise disk_error(path, error) from error


def _close(writer: GGUFWriter) -> None:
    """Close after a failed write: closing flushes, and fails once more."""
    for stream in writer.fout or []:
        try:
            stream.close()
        except OSError:
            continue

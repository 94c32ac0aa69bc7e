"""Split a GGUF file into parts, in llama.cpp's format and under its names."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Final

import numpy as np
from gguf import GGUFReader, GGUFValueType, GGUFWriter

from so8t_eval.errors import DiskError, UsageError
from so8t_train.gguf_export import disk_error, sync_file

_UNITS: Final = {"K": 10**3, "M": 10**6, "G": 10**9}
_COPIED_AT_ONCE: Final = 1 << 23
_LEAST_BYTES: Final = 1000


def parse_size(text: str) -> int:
    """Bytes of ``500M`` or ``2G`` (decimal units, as in llama.cpp).

    Raises:
        UsageError: something else.
    """
    match = re.fullmatch(r"(\d+)([KMG])", text.strip().upper())
    size = int(match[1]) * _UNITS[match[2]] if match else 0
    if size < _LEAST_BYTES:
        raise UsageError(f"--split-max-size: expected a size such as 500M or 2G, found {text!r}")
    return size


def split_gguf(path: Path, max_bytes: int) -> list[Path]:
    """Copy a file larger than ``max_bytes`` into parts beside it; the file itself stays.

    A part holds at most so many bytes of tensors, or a single tensor. llama.cpp opens the first,
    ``NAME-00001-of-0000N.gguf``, and finds the others by their names; all metadata are in it.

    Returns:
        The parts in order, or ``path`` alone if it is small enough.

    Raises:
        DiskError: a part could not be written; all are removed.
    """
    if path.stat().st_size <= max_bytes:
        return [path]
    reader = GGUFReader(path)
    architecture = reader.fields["general.architecture"].contents()
    writer = GGUFWriter(path, architecture, split_max_size=max_bytes)
    _copy_metadata(reader, writer)
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        kind, n_bytes = np.dtype(np.float32), int(tensor.n_bytes)  # the dtype is not looked at
        writer.add_tensor_info(tensor.name, shape, kind, n_bytes, tensor.tensor_type)
    if len(writer.tensors) == 1:
        return [path]
    parts: list[Path] = writer.format_shard_names(path)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        _copy_tensors(path, reader, writer)
        writer.close()
        for part in parts:
            sync_file(part)
    except (OSError, DiskError) as error:
        for part in parts:
            part.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise disk_error(path, error) from error
        raise
    return parts


def _copy_metadata(reader: GGUFReader, writer: GGUFWriter) -> None:
    for key, field in reader.fields.items():
        if key.startswith(("GGUF.", "split.")) or key == "general.architecture":
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=item)


def _copy_tensors(path: Path, reader: GGUFReader, writer: GGUFWriter) -> None:
    """Copy by file position: the reader's own view would keep every page it has touched."""
    places = {tensor.name: int(tensor.data_offset) for tensor in reader.tensors}
    with path.open("rb") as source:
        for stream, tensors in zip(writer.fout or [], writer.tensors, strict=True):
            writer.write_padding(stream, stream.tell())
            for name, tensor in tensors.items():
                source.seek(places[name])
                for chunk in _chunks(source, tensor.nbytes):
                    stream.write(chunk)
                writer.write_padding(stream, tensor.nbytes)


def _chunks(source: IO[bytes], n_bytes: int) -> Iterator[bytes]:
    while n_bytes:
        chunk = source.read(min(n_bytes, _COPIED_AT_ONCE))
        n_bytes -= len(chunk)
        yield chunk

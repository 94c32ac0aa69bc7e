"""The files of a GGUF model that was split into parts, found from the first as llama.cpp finds them.

``so8t-train export --split-max-size`` (``so8t_train.gguf_split``) and llama.cpp's llama-gguf-split
write such parts. Source: llama.cpp's ``llama_split_path`` and its keys ``split.no``, ``split.count``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from so8t_eval.backends.gguf_header import MetadataValue, read_gguf_metadata
from so8t_eval.errors import ModelFileError

_NUMBER: Final = "split.no"
_COUNT: Final = "split.count"
_PART: Final = re.compile(r"(?P<stem>.+)-\d{5}-of-\d{5}\.gguf")


def gguf_parts(path: Path, metadata: Mapping[str, MetadataValue]) -> list[Path]:
    """All files of the model that ``path``, whose metadata are given, is or begins; in order.

    Raises:
        ModelFileError: ``path`` is not the first part, has another name than a first part must
            have, or a further part is missing or not of this model.
    """
    count, number = _as_int(path, metadata, _COUNT, 1), _as_int(path, metadata, _NUMBER, 0)
    if count <= 1:
        return [path]
    match = _PART.fullmatch(path.name)
    parts = [
        path.with_name(_part_name(match["stem"] if match else "NAME", i, count))
        for i in range(count)
    ]
    if number != 0:
        raise ModelFileError(
            f"{path} is part {number + 1} of {count} of a split model; give its first part, "
            f"{parts[0].name}, which finds the others"
        )
    if path.name != parts[0].name:
        raise ModelFileError(
            f"{path} is the first part of {count} of a split model, and llama.cpp finds the others "
            f"by its name; expected {parts[0].name}: give all parts their names back"
        )
    if missing := [part.name for part in parts if not part.is_file()]:
        raise ModelFileError(
            f"{path}: expected {count} parts in {path.parent}, found no {', '.join(missing)}; copy "
            "all parts there, or export the model again"
        )
    for i, part in enumerate(parts[1:], start=1):
        _check_part(part, i, count)
    return parts


def _check_part(part: Path, number: int, count: int) -> None:
    metadata = read_gguf_metadata(part)
    found = _as_int(part, metadata, _NUMBER, 0), _as_int(part, metadata, _COUNT, 1)
    if found != (number, count):
        raise ModelFileError(
            f"{part}: expected part {number + 1} of {count} by its name, found part {found[0] + 1} "
            f"of {found[1]} inside; copy or export the parts again"
        )


def _part_name(stem: str, number: int, count: int) -> str:
    return f"{stem}-{number + 1:05d}-of-{count:05d}.gguf"


def _as_int(path: Path, metadata: Mapping[str, MetadataValue], key: str, default: int) -> int:
    value = metadata.get(key, default)
    if not isinstance(value, int):
        raise ModelFileError(
            f"{path}: {key}: expected a number, found {value!r}; export the model again"
        )
    return value

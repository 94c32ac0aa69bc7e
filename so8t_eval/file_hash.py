"""SHA-256 of files, the identity of models and case files."""

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from so8t_eval.errors import DiskError

_CHUNK_BYTES: Final = 1 << 20


def file_sha256(path: Path) -> str:
    """Return the SHA-256 (hex) of a file's bytes.

    Raises:
        DiskError: the file cannot be read.
    """
    return files_sha256([path])


def files_sha256(paths: Iterable[Path]) -> str:
    """Return the SHA-256 (hex) of the bytes of several files, one after the other.

    Raises:
        DiskError: a file cannot be read.
    """
    digest = hashlib.sha256()
    for path in paths:
        try:
            with path.open("rb") as stream:
                while chunk := stream.read(_CHUNK_BYTES):
                    digest.update(chunk)
        except OSError as error:
            raise DiskError(f"cannot read {path}: {error.strerror or error}") from error
    return digest.hexdigest()

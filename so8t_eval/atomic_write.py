"""Write files whole or not at all: temporary name in the same directory, fsync, rename."""

import contextlib
import errno
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from so8t_eval.errors import DiskError


@contextlib.contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling of ``path`` that replaces it on success and vanishes on failure.

    Raises:
        DiskError: the file could not be written (disk full, permissions), with the reason.
    """
    target = Path(path)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise DiskError(f"cannot write {target}: {error.strerror or error}") from error
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        with temporary.open("rb+") as stream:
            os.fsync(stream.fileno())
        temporary.chmod(0o644)
        temporary.replace(target)
    except OSError as error:
        raise DiskError(f"cannot write {target}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def check_writable(path: Path | str) -> None:
    """Check that ``path`` can be written, before the work whose result goes there.

    Nothing stays behind, no directory either: a file without a name is opened where the nearest
    existing directory is.

    Raises:
        DiskError: it cannot, with the reason.
    """
    target = Path(path)
    try:
        nearest = next(parent for parent in target.absolute().parents if parent.exists())
        if target.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise DiskError(f"cannot write {target}: {error.strerror or error}") from error


def atomic_write_text(path: Path | str, text: str) -> None:
    """Write ``text`` as UTF-8 with newline line ends, whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8", newline="\n")

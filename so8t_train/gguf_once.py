"""Parse a GGUF header once per model load, and fast, instead of once per question."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader


class PlainReader(GGUFReader):  # type: ignore[misc]
    """``GGUFReader`` over a plain view of the mapped file: every slice of a ``memmap`` is slow."""

    def __setattr__(self, name: str, value: object) -> None:
        plain = value.view(np.ndarray) if isinstance(value, np.memmap) else value
        super().__setattr__(name, plain)


def read_gguf(path: Path) -> GGUFReader:
    """The parsed file; the last one read is remembered until ``forget_gguf``."""
    status = path.stat()
    return _parsed(path, status.st_mtime_ns, status.st_size)


def forget_gguf() -> None:
    """Free the parsed header and unmap its file."""
    _parsed.cache_clear()


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let transformers load a GGUF from our parsed header, and its table of tensor names once.

    By itself it parses the header twice and builds the table for every module: most of the time
    that loading a small model takes. The header is forgotten afterwards.
    """
    originals: dict[str, Any] = {
        name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")
    }
    name_map: Callable[..., Any] = lru_cache(maxsize=1)(originals["get_tensor_name_map"])
    gguf.GGUFReader = lambda path: read_gguf(Path(path))
    gguf.get_tensor_name_map = name_map
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)
        forget_gguf()


@lru_cache(maxsize=1)
def _parsed(path: Path, _mtime_ns: int, _size: int) -> GGUFReader:
    return PlainReader(path)

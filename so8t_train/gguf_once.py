"""Read a GGUF's header once while transformers loads it, instead of once per question."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf import GGUFReader


class PlainReader(GGUFReader):
    """``GGUFReader`` over a plain view of the mapped file: each slice of a ``memmap`` is slow."""

    def __setattr__(self, name: str, value: Any) -> None:
        plain = value.view(np.ndarray) if isinstance(value, np.memmap) else value
        super().__setattr__(name, plain)


@lru_cache(maxsize=1)
def read_once(path: Path) -> GGUFReader:
    """The parsed file; the last one read is kept, and its file stays mapped."""
    return PlainReader(path)


@contextmanager
def parsed_once() -> Iterator[None]:
    """Let transformers use our parsed header, and build its table of tensor names once.

    It asks for the header twice and for the table once per module, seconds in all.
    """
    originals: dict[str, Any] = {
        name: getattr(gguf, name) for name in ("GGUFReader", "get_tensor_name_map")
    }
    name_map: Callable[..., Any] = lru_cache(maxsize=1)(originals["get_tensor_name_map"])
    gguf.GGUFReader = lambda path: read_once(Path(path))
    gguf.get_tensor_name_map = name_map
    try:
        yield
    finally:
        for name, original in originals.items():
            setattr(gguf, name, original)

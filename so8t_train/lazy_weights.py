"""Weights that are read and computed in blocks of rows, so that no whole model lies in memory."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Final, TypeAlias

import torch
from torch import Tensor

Shape: TypeAlias = tuple[int, ...]
_BLOCK_ELEMENTS: Final = 1 << 22
_ROW_MULTIPLE: Final = 8  # rotations mix eight rows


class LazyWeights(Mapping[str, Tensor]):
    """Float32 weights by Hugging Face name: shapes are known, numbers are made when asked for.

    ``read(name, start, stop)`` makes rows ``start`` to ``stop`` of one weight; a block begins at a
    multiple of eight rows, and ends at one or at the last row.
    """

    def __init__(self, shapes: dict[str, Shape], read: Callable[[str, int, int], Tensor]) -> None:
        self.shapes = shapes
        self._read = read

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop`` of a weight; none may be asked for."""
        if start == stop:
            return torch.zeros(0, *self.shapes[name][1:])
        return self._read(name, start, stop)

    def __getitem__(self, name: str) -> Tensor:
        """A whole weight, made anew at every call."""
        return self.rows(name, 0, self.shapes[name][0])

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes  # the mapping's own would read the weight


def shape_of(weights: Mapping[str, Tensor], name: str) -> Shape:
    """The shape of a weight, which is not read."""
    return weights.shapes[name] if isinstance(weights, LazyWeights) else tuple(weights[name].shape)


def rows_of(weights: Mapping[str, Tensor], name: str, start: int, stop: int) -> Tensor:
    """Rows ``start`` to ``stop`` of a weight, and no others where it is lazy."""
    if isinstance(weights, LazyWeights):
        return weights.rows(name, start, stop)
    return weights[name][start:stop]


def row_blocks(shape: Shape) -> Iterator[tuple[int, int]]:
    """Yield ``(start, stop)`` of blocks of about 4 M numbers, 16 MiB of float32."""
    width = max(1, math.prod(shape[1:]))
    step = max(_ROW_MULTIPLE, _BLOCK_ELEMENTS // width // _ROW_MULTIPLE * _ROW_MULTIPLE)
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])

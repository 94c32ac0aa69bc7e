"""The lines of a large JSON Lines file as a sequence: read again when asked for, never kept."""

import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, Generic, TypeVar, overload

_Item = TypeVar("_Item")
_MARK: Final = b"\xef\xbb\xbf"


def byte_lines(stream: BinaryIO) -> Iterator[tuple[int, bytes]]:
    """Yield the byte offset of each line of a whole file, and the line with its end.

    A byte order mark belongs to none.
    """
    offset = 0
    for number, line in enumerate(stream):
        marked = number == 0 and line.startswith(_MARK)
        yield (len(_MARK), line[len(_MARK) :]) if marked else (offset, line)
        offset += len(line)


class LineSequence(Sequence[_Item], Generic[_Item]):
    """What ``parse`` makes of some lines of a file; eight bytes a line are held.

    Items come in the order of ``offsets``, the byte at which each line begins. Every access reads
    the file, so go through it rather than index at random.
    """

    def __init__(self, path: Path, offsets: Iterable[int], parse: Callable[[bytes], _Item]) -> None:
        self.path = path
        self.offsets = array("q", offsets)
        self._parse = parse

    def __len__(self) -> int:
        return len(self.offsets)

    @overload
    def __getitem__(self, index: int) -> _Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[_Item]: ...
    def __getitem__(self, index: int | slice) -> _Item | list[_Item]:
        if isinstance(index, slice):
            return list(self._read(self.offsets[index]))
        return next(self._read((self.offsets[index],)))

    def __iter__(self) -> Iterator[_Item]:
        return self._read(self.offsets)

    def at(self, places: Iterable[int]) -> "LineSequence[_Item]":
        """Return the items at these places as a sequence of the same file."""
        return LineSequence(self.path, (self.offsets[place] for place in places), self._parse)

    def _read(self, offsets: Iterable[int]) -> Iterator[_Item]:
        with self.path.open("rb") as stream:
            position = 0
            for offset in offsets:
                if offset != position:
                    stream.seek(offset, os.SEEK_SET)
                line = stream.readline()
                position = offset + len(line)
                yield self._parse(line.removesuffix(b"\n"))

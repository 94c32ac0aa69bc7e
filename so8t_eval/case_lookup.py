"""Find cases by the hash of their content in a case file of any size, and the lines they stand on."""

from array import array
from collections.abc import Iterator, Mapping
from pathlib import Path

from so8t_eval.case_lines import LocatedCase, read_located_cases
from so8t_eval.cases import Case, duplicate_id, parse_case, read_cases
from so8t_eval.errors import CaseFileError
from so8t_eval.id_digests import IdDigests


class LocatedCases(Mapping[str, LocatedCase]):
    """The cases of a file by content hash, read again when asked for; of equal ones the last.

    About 200 bytes a case are held, however long it is. A case that has left the file is unknown.

    Raises:
        CaseFileError: the file cannot be read, a line is not a case, or an id repeats.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[str, int] = {}
        self._offsets, self._lines = array("q"), array("I")
        ids = IdDigests()
        for read in read_cases(path):
            self._places[read.case.content_hash] = len(self._offsets)
            self._offsets.append(read.offset)
            self._lines.append(read.line)
            ids.add(read.case.id)
        if repeat := ids.first_repeat():
            lines = self._lines[repeat.place], self._lines[repeat.first]
            case = self._read(self._offsets[repeat.place])
            raise duplicate_id(path, lines[0], case.id if case else "", lines[1])

    def __getitem__(self, content_hash: str) -> LocatedCase:
        place = self._places[content_hash]
        case = self._read(self._offsets[place])
        if case is None or case.content_hash != content_hash:
            raise KeyError(content_hash)
        return LocatedCase(self._lines[place], case)

    def __contains__(self, content_hash: object) -> bool:
        return content_hash in self._places

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)

    def _read(self, offset: int) -> Case | None:
        try:
            with self._path.open("rb") as stream:
                stream.seek(offset)
                return parse_case(self._path, None, stream.readline().removesuffix(b"\n"))
        except (OSError, CaseFileError):
            return None


def cases_by_hash(path: Path | str) -> Mapping[str, LocatedCase]:
    """Return the cases of a file by content hash; empty when the file is missing or broken."""
    source = Path(path)
    if source.exists() and not source.is_file():  # a pipe can be read once
        return {found.case.content_hash: found for found in read_located_cases(source).cases}
    try:
        return LocatedCases(source)
    except CaseFileError:
        return {}

"""A case file of any size: checked once from end to end, then read again case by case."""

from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

from so8t_eval.case_sampling import sampled_places, stratified_sample
from so8t_eval.cases import (
    Case,
    ReadCase,
    duplicate_id,
    load_cases,
    no_cases,
    parse_case,
    read_cases,
)
from so8t_eval.errors import CaseFileError
from so8t_eval.id_digests import IdDigests
from so8t_eval.labels import SEVERITY_ORDER
from so8t_eval.line_sequence import LineSequence


def open_cases(path: Path | str, limit: int | None = None, seed: int = 0) -> Sequence[Case]:
    """Check a case file as ``load_cases`` does; return its cases, read again when asked for.

    ``limit`` makes it a stratified sample of so many. What is no regular file (a pipe) is loaded.

    Raises:
        CaseFileError: as ``load_cases``; from the result, when the file was changed meanwhile.
    """
    source = Path(path)
    if source.exists() and not source.is_file():
        loaded = load_cases(source)
        return stratified_sample(loaded, limit, seed) if limit else loaded
    index = _Index(source)
    index.read()
    cases = LineSequence(source, index.offsets, _unchanged(source))
    if limit is None:
        return cases
    verdicts = [SEVERITY_ORDER[severity] for severity in index.severities]
    return cases.at(sampled_places(verdicts, limit, seed))


class _Index:
    """What is held of every case: 29 bytes, of which 8 stay after the check."""

    def __init__(self, source: Path) -> None:
        self._source = source
        self.offsets, self.lines, self.severities = array("q"), array("I"), array("b")
        self._ids = IdDigests()

    def read(self) -> None:
        """Read the file to its end, or to its first problem."""
        try:
            for read in read_cases(self._source):
                self._add(read)
        except CaseFileError:
            self._check_ids()  # a repeated id further up is the first problem
            raise
        self._check_ids()
        if not self.offsets:
            raise no_cases(self._source)

    def _add(self, read: ReadCase) -> None:
        self.offsets.append(read.offset)
        self.lines.append(read.line)
        self.severities.append(read.case.verdict.severity)
        self._ids.add(read.case.id)

    def _check_ids(self) -> None:
        if repeat := self._ids.first_repeat():
            case = LineSequence(self._source, self.offsets, _unchanged(self._source))[repeat.place]
            raise duplicate_id(
                self._source, self.lines[repeat.place], case.id, self.lines[repeat.first]
            )


def _unchanged(source: Path) -> Callable[[bytes], Case]:
    """Return the parser of a file's lines that fails once the file is another one."""

    def parse(line: bytes) -> Case:
        try:
            return parse_case(source, None, line)
        except CaseFileError as error:
            problem = "was changed while it was being judged; run it again, the file left alone"
            raise CaseFileError(source, None, None, problem) from error

    return parse

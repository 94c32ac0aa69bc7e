"""Check case files for training: what it would refuse, leave out, or learn amiss."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Final, NamedTuple

from so8t_eval.case_lines import LocatedCase, read_located_cases, read_reference_texts
from so8t_eval.cases import Case
from so8t_eval.errors import So8tError
from so8t_eval.labels import VERDICT_TOKENS
from so8t_eval.linting import (
    CaseFile,
    Finding,
    ReferenceFile,
    Severity,
    check_given_once,
    lint_files,
    schema_finding,
)
from so8t_train.base_vocabulary import BaseVocabulary
from so8t_train.case_groups import unlinked_twins
from so8t_train.case_strata import missing_verdicts
from so8t_train.training_figures import (
    TOKEN_QUANTILES,
    TokenizedCase,
    TrainingFigures,
    training_example,
    training_figures,
)

LINT_RULES: Final = frozenset({"duplicate", "near-duplicate", "reply"})
"""Findings of ``so8t-eval lint`` that bear on training; labels, tags and wording are its own."""


class DataCheck(NamedTuple):
    """Figures of the files that could be read, and all findings."""

    files: list[TrainingFigures]
    findings: list[Finding]

    @property
    def n_errors(self) -> int:
        """How many findings are errors."""
        return sum(finding.severity == "error" for finding in self.findings)

    def as_dict(self) -> dict[str, object]:
        """Return everything as JSON values."""
        return {
            "token_quantiles": TOKEN_QUANTILES,
            "files": [asdict(figures) for figures in self.files],
            "findings": [asdict(finding) for finding in self.findings],
            "errors": self.n_errors,
            "warnings": len(self.findings) - self.n_errors,
        }


def check_files(
    paths: Sequence[Path], against: Sequence[Path], vocabulary: BaseVocabulary, max_length: int
) -> DataCheck:
    """Check files that are trained on together; ``against`` are dev, benchmark or public files.

    Errors are what training refuses, and texts that repeat another file's, so that measurements
    would flatter; everything else is a warning.

    Raises:
        UsageError: a file is given twice.
        CaseFileError: a file of ``against`` cannot be read.
    """
    check_given_once([*paths, *against])
    references = [ReferenceFile(path, read_reference_texts(path)) for path in against]
    files: list[CaseFile] = []
    findings: list[Finding] = []
    for path in paths:
        read = read_located_cases(path)
        findings += map(schema_finding, read.problems)
        if read.cases:
            files.append(CaseFile(path, read.cases))
    findings += _repeated_ids(files)
    figures: list[TrainingFigures] = []
    trained_on: list[Case] = []
    for file in files:
        tokenized = _Tokenized(file, vocabulary, max_length)
        findings += [*tokenized.findings, *_control_texts(file, vocabulary), *_lone_twins(file)]
        trained_on += tokenized.fitting
        cases = [located.case for located in file.cases]
        figures.append(training_figures(str(file.path), cases, tokenized.cases, max_length))
    if len(files) == len(paths):
        findings += _missing_verdicts(paths, trained_on)
    findings += [f for f in lint_files(files, references) if f.rule in LINT_RULES]
    return DataCheck(figures, findings)


class _Tokenized:
    """The cases of a file as training tokenizes them, one by one: each failure has its name."""

    def __init__(self, file: CaseFile, vocabulary: BaseVocabulary, max_length: int) -> None:
        self.cases: list[TokenizedCase] = []
        self.fitting: list[Case] = []
        self.findings: list[Finding] = []
        for located in file.cases:
            try:
                item = TokenizedCase(located, training_example(located.case, vocabulary))
            except So8tError as error:
                self.findings.append(_finding("error", "template", file, located, str(error)))
                continue
            self.cases.append(item)
            if item.example.prompt.length <= max_length:
                self.fitting.append(located.case)
            if item.longest_pass > max_length:
                self.findings.append(_too_long(file, item, max_length))


def _too_long(file: CaseFile, item: TokenizedCase, max_length: int) -> Finding:
    tokens = f"{item.longest_pass} tokens against a max_length of {max_length}"
    if item.example.prompt.length > max_length:
        message = f"{tokens}; training leaves the case out"
        return _finding("warning", "too-long", file, item.located, message)
    message = f"{tokens} with its reply; training learns its verdict alone"
    return _finding("warning", "long-reply", file, item.located, message)


def _repeated_ids(files: Sequence[CaseFile]) -> Iterator[Finding]:
    first_in: dict[str, CaseFile] = {}
    for file in files:
        for located in file.cases:
            first = first_in.setdefault(located.case.id, file)
            if first is not file:
                message = f"the id is used in {first.path} too; training refuses that"
                yield _finding("error", "repeated-id", file, located, message)


def _control_texts(file: CaseFile, vocabulary: BaseVocabulary) -> Iterator[Finding]:
    tokens = vocabulary.control_texts
    for located in file.cases:
        case = located.case
        texts = {"prompt": case.text, "policy": case.policy or "", "reply": case.reply or ""}
        for field, text in texts.items():
            # The rule 'reply' speaks of verdict tokens in replies already.
            known = VERDICT_TOKENS if field == "reply" else ()
            held = [token for token in tokens if token in text and token not in known]
            if held:
                message = (
                    f"the {field} holds {', '.join(held)}, which training reads as plain text, not "
                    "as a control token; if a chat template put it there, give the bare text"
                )
                yield _finding("warning", "control-text", file, located, message)


def _lone_twins(file: CaseFile) -> Iterator[Finding]:
    lone = set(unlinked_twins([located.case for located in file.cases]))
    for located in file.cases:
        if located.case.id in lone:
            message = (
                "tagged twin, and its note names no case of this file ('twin of ID'); split and "
                "balance cannot keep the pair together"
            )
            yield _finding("warning", "lone-twin", file, located, message)


def _missing_verdicts(paths: Sequence[Path], cases: Sequence[Case]) -> Iterator[Finding]:
    for verdict in missing_verdicts(cases):
        message = f"no case with verdict {verdict.value} to train on; the verdict head needs some"
        yield Finding("error", "missing-verdict", ", ".join(map(str, paths)), None, None, message)


def _finding(
    severity: Severity, rule: str, file: CaseFile, located: LocatedCase, message: str
) -> Finding:
    return Finding(severity, rule, str(file.path), located.line, located.case.id, message)

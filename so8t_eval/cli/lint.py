"""``so8t-eval lint``: check case files before anything is trained or measured on them."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import click
from rich.console import Console

from so8t_eval.case_lines import read_located_cases, read_reference_texts
from so8t_eval.cli.shared_options import json_option
from so8t_eval.counted import counted
from so8t_eval.labels import SEVERITY_ORDER
from so8t_eval.lint_statistics import LENGTH_QUANTILES, FileStatistics, file_statistics
from so8t_eval.linting import (
    CaseFile,
    Finding,
    ReferenceFile,
    check_given_once,
    lint_files,
    schema_finding,
)
from so8t_eval.plain_tables import TablePrinter

_FINDINGS_SHOWN = 200


@click.command(short_help="Check case files and look for near-duplicates.")
@click.argument("cases", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "--against",
    multiple=True,
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSONL with prompt, messages or text that CASES must not repeat. Repeatable.",
)
@json_option
def lint(*, cases: tuple[Path, ...], against: tuple[Path, ...], as_json: bool) -> int:
    """Check the case files CASES: labels, twins, tags, languages, balance, near-duplicates.

    Files given together must not repeat one another. Ends with 0 when there are no errors
    (warnings alone are no failure), with 2 when there are.
    """
    check_given_once([*cases, *against])
    findings: list[Finding] = []
    files: list[CaseFile] = []
    for path in cases:
        read = read_located_cases(path)
        findings += map(schema_finding, read.problems)
        files.append(CaseFile(path, read.cases))
    references = [ReferenceFile(path, read_reference_texts(path)) for path in against]
    findings += lint_files(files, references)
    statistics = {
        str(file.path): file_statistics([located.case for located in file.cases])
        for file in files
        if file.cases
    }
    if as_json:
        click.echo(_as_json(statistics, findings))
    else:
        _print(statistics, findings)
    return 2 if any(finding.severity == "error" for finding in findings) else 0


def _as_json(statistics: dict[str, FileStatistics], findings: Sequence[Finding]) -> str:
    return json.dumps(
        {
            "files": [{"path": path, **asdict(of_file)} for path, of_file in statistics.items()],
            "findings": [asdict(finding) for finding in findings],
            "errors": sum(finding.severity == "error" for finding in findings),
            "warnings": sum(finding.severity == "warning" for finding in findings),
        },
        ensure_ascii=False,
        indent=2,
    )


def _print(statistics: dict[str, FileStatistics], findings: Sequence[Finding]) -> None:
    printer = TablePrinter(Console())
    for path, of_file in statistics.items():
        _print_statistics(printer, path, of_file)
    for finding in findings[:_FINDINGS_SHOWN]:
        printer.line(str(finding))
    if len(findings) > _FINDINGS_SHOWN:
        printer.line(f"... and {len(findings) - _FINDINGS_SHOWN} more; --json lists all")
    errors = sum(finding.severity == "error" for finding in findings)
    printer.line(f"{counted(errors, 'error')}, {counted(len(findings) - errors, 'warning')}")


def _print_statistics(printer: TablePrinter, path: str, statistics: FileStatistics) -> None:
    langs = list(statistics.length_characters)
    counts = statistics.verdict_by_lang
    printer.line(f"{path}: {counted(statistics.n, 'case')}")
    printer.table(
        ["verdict", *langs, "all", "with reply"],
        (
            [
                verdict.value,
                *(str(counts[f"{verdict.value}/{lang}"]) for lang in langs),
                str(sum(counts[f"{verdict.value}/{lang}"] for lang in langs)),
                str(statistics.replies[verdict.value]),
            ]
            for verdict in SEVERITY_ORDER
        ),
    )
    printer.table(
        ["characters", *map(_quantile, LENGTH_QUANTILES)],
        ([lang, *map(str, lengths)] for lang, lengths in statistics.length_characters.items()),
    )
    for lang, figures in statistics.diversity.items():
        ratio = figures.type_token_ratio
        printer.line(
            f"{lang}: type/token ratio {'unknown' if ratio is None else f'{ratio:.2f}'}, "
            f"most frequent opening {figures.opening!r} in {figures.n_with_opening}"
        )
    for what, of_kind in (("categories", statistics.categories), ("tags", statistics.tags)):
        listed = ", ".join(f"{name} {n}" for name, n in of_kind.items())
        printer.line(f"{what}: {listed or 'none'}")
    printer.line()


def _quantile(q: float) -> str:
    return {0.0: "min", 0.5: "median", 1.0: "max"}.get(q, f"{q:.0%}")

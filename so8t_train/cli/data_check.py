"""``so8t-train data check``: look at case files as training will."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Final

import click

from so8t_eval.counted import counted
from so8t_train.cli.data_options import FILE, base_model_options

if TYPE_CHECKING:
    from so8t_eval.plain_tables import TablePrinter
    from so8t_train.data_check import DataCheck
    from so8t_train.training_figures import TrainingFigures

_FINDINGS_SHOWN: Final = 100


@click.command(short_help="Look at case files as training will.")
@click.argument("files", nargs=-1, required=True, type=FILE, metavar="FILE...")
@click.option(
    "--against",
    multiple=True,
    type=FILE,
    metavar="FILE",
    help="Dev, benchmark or public file (JSONL with prompt, messages or text) that FILE must not "
    "repeat. Repeatable.",
)
@base_model_options
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def check(
    *,
    files: tuple[Path, ...],
    against: tuple[Path, ...],
    base_model: str,
    max_length: int,
    as_json: bool,
) -> int:
    """Look at the case files FILE as training will, which reads them as one.

    Shows classes, replies and lengths in tokens. Errors: broken lines, ids used twice, a verdict
    without cases, texts that occur twice or resemble another file's. Warnings: cases longer than
    --max-length, near-duplicates within a file, control-token text, useless replies, twins without
    partner. Labels, tags and wording are checked by so8t-eval lint.

    Ends with 0 when there are no errors (warnings alone are no failure), with 2 when there are.
    """
    import json

    from rich.console import Console

    from so8t_eval.plain_tables import TablePrinter
    from so8t_train.base_vocabulary import open_vocabulary
    from so8t_train.data_check import check_files

    result = check_files(files, against, open_vocabulary(base_model), max_length)
    if as_json:
        facts = {"base_model": base_model, "max_length": max_length, **result.as_dict()}
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
    else:
        _print(TablePrinter(Console()), result, max_length)
    return 2 if result.n_errors else 0


def _print(printer: "TablePrinter", result: "DataCheck", max_length: int) -> None:
    for figures in result.files:
        printer.line(f"{figures.path}: {counted(figures.n, 'case')}")
        _print_classes(printer, figures)
        _print_lengths(printer, figures)
        printer.line(
            f"longer than {max_length} tokens: {len(figures.too_long)} left out, "
            f"{len(figures.long_replies)} with their verdict alone"
        )
        printer.line()
    for finding in result.findings[:_FINDINGS_SHOWN]:
        printer.line(str(finding))
    if len(result.findings) > _FINDINGS_SHOWN:
        more = len(result.findings) - _FINDINGS_SHOWN
        printer.line(f"... and {more} more; --json lists all")
    n_warnings = len(result.findings) - result.n_errors
    printer.line(f"{counted(result.n_errors, 'error')}, {counted(n_warnings, 'warning')}")


def _print_classes(printer: "TablePrinter", figures: "TrainingFigures") -> None:
    from so8t_eval.labels import SEVERITY_ORDER

    langs = sorted({name.partition("/")[2] for name in figures.cases})
    rows = []
    for verdict in SEVERITY_ORDER:
        counts = [figures.cases[f"{verdict.value}/{lang}"] for lang in langs]
        replies = sum(figures.with_reply[f"{verdict.value}/{lang}"] for lang in langs)
        n = sum(counts)
        reply_share = f"{replies / n:.1%}" if n else "undefined"
        rows.append([verdict.value, *map(str, counts), str(n), f"{n / figures.n:.1%}", reply_share])
    printer.table(["verdict", *langs, "all", "share", "with reply"], rows)


def _print_lengths(printer: "TablePrinter", figures: "TrainingFigures") -> None:
    from so8t_train.training_figures import TOKEN_QUANTILES

    names = {0.0: "min", 0.5: "median", 1.0: "max"}
    headers = [names.get(q, f"{q:.0%}") for q in TOKEN_QUANTILES]

    def rows() -> Iterator[list[str]]:
        for lang, lengths in figures.tokens.items():
            yield [f"{lang} prompt", *map(str, lengths.prompt)]
            yield [f"{lang} longest pass", *map(str, lengths.longest_pass)]

    printer.table(["tokens", *headers], rows())

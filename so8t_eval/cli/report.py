"""``so8t-eval report``: one HTML file that shows runs with their plots and every case."""

import contextlib
from collections.abc import Mapping
from pathlib import Path

import click

from so8t_eval.atomic_write import atomic_path
from so8t_eval.errors import UsageError
from so8t_eval.html_report import render_report_html
from so8t_eval.markdown_report import render_report_md
from so8t_eval.redaction import KEY_VARIABLE, Redactor, load_redactor
from so8t_eval.report_cases import DEFAULT_TABLE_CASES
from so8t_eval.report_input import ReportInput, read_case_texts, read_report_input


@click.command(short_help="Show runs in one HTML file.")
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE.html",
    help="The report; it needs no other file and no network (default: report.html in the first "
    "RUN).",
)
@click.option(
    "--markdown",
    type=click.Path(path_type=Path),
    metavar="FILE.md",
    help="Write the figures as Markdown too.",
)
@click.option(
    "--cases",
    "case_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Case file whose texts to show (default: the one that was run, if it is there).",
)
@click.option(
    "--table-cases",
    type=click.IntRange(min=0),
    default=DEFAULT_TABLE_CASES,
    show_default=True,
    metavar="N",
    help="Cases in the page's table, flips and wrong ones first; the page says what it leaves out.",
)
@click.option(
    "--redact",
    is_flag=True,
    help="Show a keyed hash (HMAC-SHA-256) in place of prompts and error texts.",
)
@click.option(
    "--redact-key-file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help=f"Secret key of the hashes (default: the environment variable {KEY_VARIABLE}).",
)
def report(
    *,
    runs: tuple[Path, ...],
    output: Path | None,
    markdown: Path | None,
    case_file: Path | None,
    table_cases: int,
    redact: bool,
    redact_key_file: Path | None,
) -> None:
    """Write a report of one or more runs of the same cases.

    Each RUN is a directory written by so8t-eval run, or its records.jsonl; the first model of the
    first run is what the others are compared with. Equal input gives equal bytes.
    """
    output = output or _directory(runs[0]) / "report.html"
    _check_options(output, markdown, case_file, redact, redact_key_file)
    redactor = load_redactor(redact_key_file) if redact else None
    data = read_report_input(runs)
    html, text = (
        _redacted(data, redactor, table_cases) if redactor else _plain(data, case_file, table_cases)
    )
    written = {output: html} if markdown is None else {output: html, markdown: text}
    _write_all(written)
    for path in written:
        click.echo(f"Report: {path}", err=True)


def _directory(run: Path) -> Path:
    return run if run.is_dir() else run.parent


def _check_options(
    output: Path, markdown: Path | None, case_file: Path | None, redact: bool, key_file: Path | None
) -> None:
    if output.suffix != ".html":
        raise UsageError(f"-o {output}: expected a name ending in .html")
    if markdown is not None and markdown.suffix != ".md":
        raise UsageError(f"--markdown {markdown}: expected a name ending in .md")
    if key_file is not None and not redact:
        raise UsageError("--redact-key-file needs --redact")
    if case_file is not None and redact:
        raise UsageError("--cases shows texts and --redact hides them; give one of them")


def _plain(data: ReportInput, case_file: Path | None, table_cases: int) -> tuple[str, str]:
    """Return the HTML and the Markdown report."""
    texts = read_case_texts(data.summary, data.records[0], case_file)
    if texts.note:
        click.echo(texts.note, err=True)
    notes = [texts.note] if texts.note else []
    html = render_report_html(
        data,
        texts.of,
        notes=notes,
        table_cases=table_cases,
    )
    return html, render_report_md(data.summary.model_dump(mode="json"))


def _redacted(data: ReportInput, redactor: Redactor, table_cases: int) -> tuple[str, str]:
    """Return the HTML and the Markdown report without texts that may be prompts."""
    hidden = ReportInput(redactor.summary(data.summary), data.records, data.notes)
    html = render_report_html(
        hidden, redactor.prompt, redaction_key=redactor.key_id, table_cases=table_cases
    )
    return html, render_report_md(hidden.summary.model_dump(mode="json"))


def _write_all(documents: Mapping[Path, str]) -> None:
    """Write all files, none before the last of them is on disk."""
    with contextlib.ExitStack() as stack:
        for path, text in documents.items():
            temporary = stack.enter_context(atomic_path(path))
            temporary.write_text(text, encoding="utf-8", newline="\n")

"""``so8t-eval import``: public safety sets, or files with columns of your own, as case files."""

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import click

from so8t_eval.atomic_write import atomic_write_text
from so8t_eval.case_import import Imported, import_cases
from so8t_eval.cases import Case
from so8t_eval.counted import counted
from so8t_eval.errors import CaseFileError, UsageError
from so8t_eval.import_layouts import (
    GENERIC_LAYOUTS,
    PUBLIC_LAYOUTS,
    Layout,
    OwnColumns,
    generic_layout,
)
from so8t_eval.import_rows import folded
from so8t_eval.labels import SEVERITY_ORDER, Verdict

_FORMATS: Final = sorted({**PUBLIC_LAYOUTS, **GENERIC_LAYOUTS})
_PROBLEMS_SHOWN: Final = 20


@click.command("import", short_help="Turn a public safety set into a case file.")
@click.argument("layout_name", type=click.Choice(_FORMATS), metavar="FORMAT")
@click.argument(
    "files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE..."
)
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    metavar="CASES.jsonl",
    help="The case file to write.",
)
@click.option(
    "--lang", default="en", show_default=True, metavar="LANG", help="Language of the prompts."
)
@click.option("--prompt-column", metavar="NAME", help="csv, jsonl: the text to judge.")
@click.option(
    "--label-column", metavar="NAME", help="csv, jsonl: the label, a verdict or see --map."
)
@click.option(
    "--map",
    "mappings",
    multiple=True,
    metavar="VALUE=VERDICT",
    help="csv, jsonl: the verdict that a label stands for. Repeatable.",
)
@click.option(
    "--verdict",
    type=click.Choice([verdict.value for verdict in SEVERITY_ORDER]),
    help="Verdict of every row: csv and jsonl without a label column, and jailbreakbench files "
    "whose name does not say harmful or benign.",
)
@click.option("--id-column", metavar="NAME", help="csv, jsonl: ids (default: numbered rows).")
@click.option(
    "--category-column", metavar="NAME", help="csv, jsonl: categories (default: FORMAT/VERDICT)."
)
@click.option(
    "--skip-invalid", is_flag=True, help="Leave out rows that are no case, and say which."
)
def import_command(
    *,
    layout_name: str,
    files: tuple[Path, ...],
    output: Path,
    lang: str,
    prompt_column: str | None,
    label_column: str | None,
    mappings: tuple[str, ...],
    verdict: str | None,
    id_column: str | None,
    category_column: str | None,
    skip_invalid: bool,
) -> None:
    """Write the cases of each FILE, CSV or JSONL, plain or gzip, to one case file.

    FORMAT is how they are laid out: advbench, harmbench, jailbreakbench, openai-moderation,
    simplesafetytests, strongreject, toxicchat, xstest, or csv or jsonl with columns of your own.
    Nothing is downloaded. Harmful prompts become refuse, benign ones allow, and their cases are
    tagged binary: so8t-eval binary scores a run on them.
    """
    if layout_name in PUBLIC_LAYOUTS:
        options = {
            "--prompt-column": prompt_column,
            "--label-column": label_column,
            "--map": mappings or None,
            "--id-column": id_column,
            "--category-column": category_column,
        }
        layout = _public_layout(layout_name, options, verdict)
    elif prompt_column is None:
        raise UsageError(f"{layout_name}: name the column of the text with --prompt-column NAME")
    else:
        columns = OwnColumns(prompt_column, label_column, id_column, category_column)
        layout = _own_layout(layout_name, columns, mappings, verdict)
    if not lang.strip():
        raise UsageError("--lang: expected a language such as en or ja, found nothing")
    _check_output(output, files)
    imported = import_cases(
        layout, files, lang=lang, verdict=None if verdict is None else Verdict(verdict)
    )
    _check_problems(imported, skip_invalid)
    lines = (case.model_dump_json(exclude_defaults=True) + "\n" for case in imported.cases)
    atomic_write_text(output, "".join(lines))
    click.echo(f"{output}: {_counts(imported.cases)}")
    _report_left_out(imported.problems)


def _public_layout(name: str, options: Mapping[str, object], verdict: str | None) -> Layout:
    layout = PUBLIC_LAYOUTS[name]
    given = [option for option, value in options.items() if value is not None]
    if given:
        raise UsageError(
            f"{given[0]}: the columns of {name} are known; use it with csv or jsonl, as in "
            f"so8t-eval import csv FILE {given[0]} ..."
        )
    if verdict is not None and not layout.verdict_from_file_name:
        raise UsageError(f"--verdict: the rows of {name} have their own; leave it out")
    if verdict == Verdict.ESCALATE.value:
        raise UsageError(f"--verdict: {name} files are harmful or benign; say refuse or allow")
    return layout


def _own_layout(
    name: str, columns: OwnColumns, mappings: Sequence[str], verdict: str | None
) -> Layout:
    if (columns.label is None) == (verdict is None):
        found = "neither" if verdict is None else "both"
        raise UsageError(
            f"{name}: expected either --label-column NAME or --verdict VERDICT, found {found}"
        )
    if mappings and columns.label is None:
        raise UsageError("--map: needs --label-column NAME")
    return generic_layout(name, columns, _verdict_of(mappings))


def _verdict_of(mappings: Sequence[str]) -> dict[str, Verdict]:
    """Read VALUE=VERDICT at the last equals sign, so that a value may hold one."""
    names = [verdict.value for verdict in SEVERITY_ORDER]
    found: dict[str, Verdict] = {}
    for mapping in mappings:
        value, equals, name = mapping.rpartition("=")
        if not equals or name.strip().casefold() not in names:
            raise UsageError(
                f"--map: expected VALUE=VERDICT with one of {', '.join(names)}, found {mapping!r}"
            )
        if folded(value) in map(folded, found):
            raise UsageError(f"--map: {value!r} is given twice; labels are compared in any case")
        found[value] = Verdict(name.strip().casefold())
    return found


def _check_output(output: Path, files: Sequence[Path]) -> None:
    if output.suffix != ".jsonl":
        raise UsageError(f"-o {output}: expected a name ending in .jsonl")
    if output.resolve() in {path.resolve() for path in files}:
        raise UsageError(f"-o {output}: would overwrite the file to import; choose another name")


def _check_problems(imported: Imported, skip_invalid: bool) -> None:
    problems = imported.problems
    if problems and not skip_invalid:
        others = (
            f"; {counted(len(problems) - 1, 'row')} more cannot be used"
            if len(problems) > 1
            else ""
        )
        raise UsageError(
            f"{problems[0]}{others}; nothing was written. Correct the file, or leave such rows out "
            "with --skip-invalid"
        )
    if not imported.cases:
        raise UsageError(f"no row is a case; the first of {len(problems)} problems: {problems[0]}")


def _report_left_out(problems: Sequence[CaseFileError]) -> None:
    if not problems:
        return
    click.echo(f"left out {counted(len(problems), 'row')}:", err=True)
    for problem in problems[:_PROBLEMS_SHOWN]:
        click.echo(f"  {problem}", err=True)
    if len(problems) > _PROBLEMS_SHOWN:
        click.echo(f"  ... and {len(problems) - _PROBLEMS_SHOWN} more", err=True)


def _counts(cases: Sequence[Case]) -> str:
    by_verdict = Counter(case.verdict for case in cases)
    parts = [f"{by_verdict[v]} {v.value}" for v in SEVERITY_ORDER if by_verdict[v]]
    return f"{counted(len(cases), 'case')} ({', '.join(parts)})"

"""``so8t-eval compare``: what changed from one run to another, and whether the data can tell."""

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from so8t_eval.agreement import Flip
from so8t_eval.atomic_write import atomic_write_text
from so8t_eval.case_lines import LocatedCase
from so8t_eval.case_lookup import cases_by_hash
from so8t_eval.cli.shared_options import json_file_option, json_option, seed_option
from so8t_eval.comparison import Comparison, compare_records
from so8t_eval.counted import counted
from so8t_eval.errors import UsageError
from so8t_eval.metric_differences import LOWER_IS_BETTER, MetricDifference
from so8t_eval.plain_tables import TablePrinter
from so8t_eval.run_selection import SelectedRun, select_run

_FLIPS_SHOWN: Final = 20
_TEXT_SHOWN: Final = 70

_NOTE: Final = """\
Change: candidate minus base, with its 95 % interval, on the same cases. Rates: mid-p McNemar
and Tango's interval; the others: paired bootstrap. p (Holm) is adjusted for the number of metrics.
Detects: the smallest difference that n cases find with power 0.8 at p < 0.05 before adjustment;
for rates the d with n = (1.960 sqrt(s) + 0.842 sqrt(s - d^2))^2 / d^2, where s is the share of
cases on which the runs differ, or d if larger; for the others 2.80 standard errors of the
difference."""


@click.command(short_help="Compare two runs, with tests.")
@click.argument("base", type=click.Path(path_type=Path))
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--base-model", metavar="TEXT", help="Part of the base model's name, if BASE has several."
)
@click.option(
    "--candidate-model",
    metavar="TEXT",
    help="Part of the candidate model's name, if CANDIDATE has several.",
)
@click.option(
    "--cases",
    "case_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Case file whose texts to show (default: the one CANDIDATE was run on, if it is there).",
)
@click.option(
    "--allow-protocol-difference",
    is_flag=True,
    help="Compare even though the models were asked differently.",
)
@seed_option("Bootstrap seed.")
@json_option
@json_file_option
def compare(
    *,
    base: Path,
    candidate: Path,
    base_model: str | None,
    candidate_model: str | None,
    case_file: Path | None,
    allow_protocol_difference: bool,
    seed: int,
    as_json: bool,
    output: Path | None,
) -> None:
    """Compare the run CANDIDATE with the run BASE, case by case.

    Each is a directory written by so8t-eval run, or its records.jsonl. Cases are paired by their
    content; different cases, labels or protocols are an error.
    """
    if output is not None and output.suffix != ".json":
        raise UsageError(f"-o {output}: expected a name ending in .json")
    runs = (
        select_run(base, base_model, option="--base-model"),
        select_run(candidate, candidate_model, option="--candidate-model"),
    )
    comparison = compare_records(
        runs[0].records,
        runs[1].records,
        seed=seed,
        allow_protocol_difference=allow_protocol_difference,
    )
    texts = _texts(case_file, runs[1])
    facts = json.dumps(_facts(comparison, runs, texts, seed), ensure_ascii=False, indent=2)
    if output is not None:
        atomic_write_text(output, facts + "\n")
    if as_json:
        click.echo(facts)
    else:
        _print(comparison, runs, texts)


def _texts(case_file: Path | None, candidate: SelectedRun) -> Mapping[str, LocatedCase]:
    if case_file is not None:
        texts = cases_by_hash(case_file)
        if not texts:
            raise UsageError(f"--cases {case_file}: no case file; check it with so8t-eval lint")
        return texts
    return cases_by_hash(candidate.cases_path) if candidate.cases_path else {}


def _facts(
    comparison: Comparison,
    runs: tuple[SelectedRun, SelectedRun],
    texts: Mapping[str, LocatedCase],
    seed: int,
) -> dict[str, object]:
    def flip_facts(flip: Flip) -> dict[str, object]:
        located = texts.get(comparison.content_hashes[flip.id])
        return {**asdict(flip), "text": located.case.text if located else None}

    return {
        "base": {"run": runs[0].source, "model": runs[0].label},
        "candidate": {"run": runs[1].source, "model": runs[1].label},
        "n": comparison.n,
        "seed": seed,
        "same_protocol": comparison.same_protocol,
        "metrics": {
            difference.metric: {
                **asdict(difference),
                "discordant": difference.discordant and difference.discordant._asdict(),
            }
            for difference in comparison.metrics
        },
        "flips": {
            direction: [flip_facts(flip) for flip in flips]
            for direction, flips in comparison.flips.items()
        },
    }


def _print(
    comparison: Comparison,
    runs: tuple[SelectedRun, SelectedRun],
    texts: Mapping[str, LocatedCase],
) -> None:
    printer = TablePrinter(Console())
    printer.line(f"base:      {runs[0].label} ({runs[0].source})")
    printer.line(f"candidate: {runs[1].label} ({runs[1].source})")
    printer.line(f"{counted(comparison.n, 'case')} in both")
    if not comparison.same_protocol:
        printer.line("The runs used different protocols: differences are not the model's alone.")
    printer.table(
        ["metric", "base", "candidate", "change", "p (Holm)", "detects", "n"],
        map(_metric_row, comparison.metrics),
    )
    printer.line(_NOTE.replace("\n", " "))
    n_flips = sum(map(len, comparison.flips.values()))
    printer.line(f"Flips: {n_flips}")
    for direction, flips in comparison.flips.items():
        printer.line(f"{direction}: {len(flips)}")
        for flip in flips[:_FLIPS_SHOWN]:
            located = texts.get(comparison.content_hashes[flip.id])
            printer.line(f"  {_flip_line(flip, located)}")
        if len(flips) > _FLIPS_SHOWN:
            printer.line(f"  ... and {len(flips) - _FLIPS_SHOWN} more; --json lists all")


def _metric_row(difference: MetricDifference) -> list[str]:
    shown = "undefined"
    if difference.difference is not None:
        shown = f"{difference.difference:+.3f} {_bounds(difference)}"
    return [
        difference.label,
        _number(difference.base),
        _number(difference.candidate),
        shown,
        f"{_number(difference.p_value)} ({_number(difference.p_holm)}){_mark(difference)}",
        _number(difference.minimum_detectable),
        str(difference.n),
    ]


def _bounds(difference: MetricDifference) -> str:
    if difference.low is None or difference.high is None:
        return "[no interval]"
    return f"[{difference.low:+.3f}, {difference.high:+.3f}]"


def _mark(difference: MetricDifference) -> str:
    """Say which way a difference goes, where the adjusted test finds one."""
    if difference.p_holm is None or difference.p_holm >= 0.05 or not difference.difference:
        return ""
    is_worse = (difference.difference > 0) == (difference.metric in LOWER_IS_BETTER)
    return " worse" if is_worse else " better"


def _flip_line(flip: Flip, located: LocatedCase | None) -> str:
    margins = " -> ".join(_number(margin) for margin in (flip.margin_a, flip.margin_b))
    line = f"{flip.id}  {flip.category}  expected {flip.expected}  margin {margins}"
    if located is None:
        return line
    text = " ".join(located.case.text.split())
    return f"{line}  {text if len(text) <= _TEXT_SHOWN else text[: _TEXT_SHOWN - 3] + '...'}"


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.3f}"

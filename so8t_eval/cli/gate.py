"""``so8t-eval gate``: pass or fail a run by a policy file, for continuous integration."""

from collections.abc import Sequence
from pathlib import Path

import click
from rich.console import Console

from so8t_eval.atomic_write import atomic_write_text
from so8t_eval.case_lookup import cases_by_hash
from so8t_eval.ci_gate import evaluate
from so8t_eval.cli.shared_options import output_files_option, seed_option
from so8t_eval.errors import UsageError
from so8t_eval.gate_policy import load_policy
from so8t_eval.gate_reports import CaseLocations, as_json, print_result, report_writers
from so8t_eval.plain_tables import TablePrinter
from so8t_eval.run_selection import SelectedRun, select_run


@click.command("gate", short_help="Pass or fail a run by a policy file.")
@click.argument("candidate", type=click.Path(path_type=Path))
@click.option(
    "--policy",
    required=True,
    type=click.Path(path_type=Path),
    metavar="FILE.toml",
    help="The rules; benchmarks/policy.toml is an example.",
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run that regression, flip and latency rules compare with.",
)
@click.option("--model", metavar="TEXT", help="Part of the model's name, if CANDIDATE has several.")
@click.option(
    "--baseline-model",
    metavar="TEXT",
    help="Part of the model's name, if the baseline has several.",
)
@click.option(
    "--cases",
    "case_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Case file that reports point at (default: the one CANDIDATE was run on).",
)
@click.option(
    "--allow-protocol-difference",
    is_flag=True,
    help="Compare even though the models were asked differently.",
)
@seed_option("Bootstrap seed.")
@click.option("--json", "print_json", is_flag=True, help="Print one JSON object.")
@output_files_option("Report: .md (pull request), .xml (JUnit), .sarif or .json. Repeatable.")
def ci_gate(
    *,
    candidate: Path,
    policy: Path,
    baseline: Path | None,
    model: str | None,
    baseline_model: str | None,
    case_file: Path | None,
    allow_protocol_difference: bool,
    seed: int,
    print_json: bool,
    outputs: tuple[Path, ...],
) -> int:
    """Check the run CANDIDATE against the rules of a policy file.

    Ends with 0 when every rule passes, 1 when one fails, 4 when none fails but the data cannot
    tell for at least one.
    """
    _check_outputs(outputs)
    rules = load_policy(policy)
    if baseline is None and baseline_model is not None:
        raise UsageError("--baseline-model needs --baseline")
    run = select_run(candidate, model, option="--model")
    base = select_run(baseline, baseline_model, option="--baseline-model") if baseline else None
    result = evaluate(
        rules, run, base, seed=seed, allow_protocol_difference=allow_protocol_difference
    )
    writers = report_writers(_locations(case_file, run))
    for path in outputs:
        atomic_write_text(path, writers[path.suffix](result))
    if print_json:
        click.echo(as_json(result), nl=False)
    else:
        print_result(result, TablePrinter(Console()))
    return result.exit_code


def _check_outputs(outputs: Sequence[Path]) -> None:
    endings = report_writers(None)
    for path in outputs:
        if path.suffix not in endings:
            raise UsageError(f"-o {path}: expected a name ending in {', '.join(endings)}")


def _locations(case_file: Path | None, run: SelectedRun) -> CaseLocations | None:
    path = str(case_file) if case_file is not None else run.cases_path
    if path is None:
        return None
    by_hash = cases_by_hash(path)
    if case_file is not None and not by_hash:
        raise UsageError(f"--cases {case_file}: no case file; check it with so8t-eval lint")
    return CaseLocations(path, by_hash)

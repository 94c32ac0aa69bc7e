"""``so8t-eval drift``: which step from the trained adapter to the smallest file moves a verdict."""

import platform
from pathlib import Path
from typing import Final

import click
from rich.console import Console

from so8t_eval.atomic_write import atomic_write_text, check_writable
from so8t_eval.backends.cpu_threads import default_threads
from so8t_eval.case_sampling import stratified_sample
from so8t_eval.cases import load_cases
from so8t_eval.cli.model_options import report_line, runtime_options
from so8t_eval.cli.progress_bar import progress_bar
from so8t_eval.cli.shared_options import limit_option, output_files_option, seed_option
from so8t_eval.drift_ladder import STEPS, ladder_provider, parse_steps
from so8t_eval.drift_report import DriftReport, build_drift_report, drift_json
from so8t_eval.drift_run import Scoring, run_drift
from so8t_eval.drift_tables import drift_markdown, print_drift
from so8t_eval.errors import UsageError
from so8t_eval.file_hash import file_sha256
from so8t_eval.plain_tables import TablePrinter
from so8t_eval.summary_schema import CasesEntry, MachineEntry

_REFERENCE: Final = "reference"


@click.command(short_help="Find the export step that moves a verdict.")
@click.argument("run", required=False, type=click.Path(path_type=Path))
@click.argument("cases", required=False, type=click.Path(path_type=Path))
@click.option(
    "--steps",
    default=",".join(STEPS),
    show_default=True,
    metavar="STEPS",
    help="Two or more steps, comma-separated.",
)
@limit_option
@seed_option("Seed of the sample and of the shuffled order.")
@click.option(
    "--keep",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory to create with every model and record (default: deleted at the end).",
)
@click.option(
    "--deterministic",
    is_flag=True,
    help="Bit-equal records on repeated runs: prompts are computed one by one in a fixed order, "
    "with one thread unless --threads says otherwise; llama.cpp without flash attention.",
)
@click.option(
    "--max-unsafe-flips",
    type=click.IntRange(min=0),
    metavar="N",
    help="Fail if more than N verdicts of any step went from refuse, at the first step, to allow "
    "(default: report only).",
)
@output_files_option("Write the report (.json or .md). Repeatable.")
@runtime_options
def drift(
    *,
    run: Path | None,
    cases: Path | None,
    steps: str,
    limit: int | None,
    seed: int,
    keep: Path | None,
    deterministic: bool,
    max_unsafe_flips: int | None,
    outputs: tuple[Path, ...],
    threads: int | None,
    batch_tokens: int | None,
    max_prompt_tokens: int,
    torch_dtype: str | None,
) -> int:
    """Export the run directory RUN step by step and judge CASES with every step's model.

    Without RUN, the reference model; without CASES, the shipped dev cases. Every step is compared
    with the one before and with the first; what is no larger than repetitions of one model is
    called noise.
    """
    _check_outputs(outputs)
    chosen = parse_steps(steps)
    provider = ladder_provider()
    case_file = cases or provider.reference_cases
    all_cases = load_cases(case_file)
    judged_cases = stratified_sample(all_cases, limit, seed) if limit else all_cases
    threads = threads or (1 if deterministic else default_threads())
    scoring = Scoring(
        order="single" if deterministic else "batched",
        threads=threads,
        batch_tokens=batch_tokens,
        max_prompt_tokens=max_prompt_tokens,
        torch_dtype=torch_dtype,
        exact=deterministic,
    )
    with (
        progress_bar() as progress,
        provider.open_ladder(
            run or provider.reference_run, chosen, keep=keep, threads=threads, report=report_line
        ) as ladder,
    ):
        result = run_drift(ladder, chosen, judged_cases, scoring, seed=seed, progress=progress)
    report = build_drift_report(
        result,
        judged_cases,
        run=_REFERENCE if run is None else str(run),
        cases_entry=CasesEntry(
            path=case_file.name if cases is None else str(cases),
            sha256=file_sha256(case_file),
            n=len(judged_cases),
        ),
        seed=seed,
        deterministic=deterministic,
        machine=MachineEntry(
            platform=f"{platform.platform()} {platform.processor() or platform.machine()}",
            threads=threads,
        ),
    )
    for path in outputs:
        text = drift_json(report) if path.suffix == ".json" else drift_markdown(report)
        atomic_write_text(path, text)
    return _print(report, max_unsafe_flips)


def _check_outputs(outputs: tuple[Path, ...]) -> None:
    for path in outputs:
        if path.suffix not in (".json", ".md"):
            raise UsageError(f"-o {path}: expected a name ending in .json or .md")
        check_writable(path)


def _print(report: DriftReport, max_unsafe_flips: int | None) -> int:
    """Print the report; return the exit code."""
    printer = TablePrinter(Console())
    print_drift(report, printer)
    found = report.most_unsafe_flips
    if max_unsafe_flips is not None and found > max_unsafe_flips:
        printer.line(
            f"FAILED  {found} verdicts went from refuse to allow, at most {max_unsafe_flips} allowed"
        )
        return 1
    return 0

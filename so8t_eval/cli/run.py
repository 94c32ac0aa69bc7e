"""``so8t-eval run``: judge a benchmark file with one or more models and write the results."""

import contextlib
import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import click
from rich.console import Console

from so8t_eval import __version__
from so8t_eval.atomic_write import atomic_write_text, check_writable
from so8t_eval.backends.judge import Judge
from so8t_eval.backends.registry import (
    ModelSpec,
    open_backend,
    open_server,
    parse_judge,
    reference_models,
)
from so8t_eval.backends.server_settings import ServerModel, ServerSettings
from so8t_eval.backends.token_id_judge import TokenIdJudge
from so8t_eval.binary_scores import BINARY_TAG
from so8t_eval.case_file import open_cases
from so8t_eval.cases import Case
from so8t_eval.cli.model_options import (
    MODEL_HELP,
    operating_point_option,
    report_line,
    runtime_options,
)
from so8t_eval.cli.progress_bar import progress_bar
from so8t_eval.cli.server_options import SERVER_HELP, server_options, server_settings
from so8t_eval.cli.shared_options import limit_option, output_files_option, seed_option
from so8t_eval.cli_errors import set_resume_command
from so8t_eval.errors import UsageError
from so8t_eval.file_hash import file_sha256
from so8t_eval.judged_records import finished_records
from so8t_eval.markdown_report import render_report_md
from so8t_eval.operating_point import BALANCED
from so8t_eval.records import (
    RecordWriter,
    holds_records,
    refuse_earlier_records,
    write_records,
)
from so8t_eval.resumed_run import check_nothing_is_dropped
from so8t_eval.runner import DEFAULT_WINDOW_CASES, run_judge_on_disk
from so8t_eval.scoring_order import in_order
from so8t_eval.summary import RunResult, build_summary, write_summary
from so8t_eval.summary_schema import CasesEntry, MachineEntry, parse_summary
from so8t_eval.terminal_table import render_summary
from so8t_eval.token_parity import check_token_ids

RECORDS, SUMMARY, REPORT = "records.jsonl", "summary.json", "report.md"

AnyJudge = Judge[Any]
"""A judge whose prompts only it understands: the runner hands back what it prepared."""


class Runtime(NamedTuple):
    """How models are opened."""

    threads: int | None
    batch_tokens: int | None
    max_prompt_tokens: int
    torch_dtype: str | None
    operating_point: str


class RunPlan(NamedTuple):
    """Everything a run needs to know."""

    case_file: Path
    cases: Sequence[Case]
    models: list[ModelSpec | ServerModel]
    seed: int
    latency_cases: int
    window_cases: int
    log_dir: Path
    resume: bool
    retry_errors: bool
    deterministic: bool
    runtime: Runtime
    server: ServerSettings


@click.command(short_help="Run a benchmark file on one or more models.")
@click.argument("cases", type=click.Path(path_type=Path))
@click.option(
    "--model",
    "models",
    multiple=True,
    metavar="PREFIX:PATH",
    help=f"{MODEL_HELP} {SERVER_HELP} Repeatable; without it, the reference model in every "
    "runtime.",
)
@limit_option
@seed_option("Seed of samples and bootstrap intervals.")
@click.option(
    "--latency-cases",
    type=click.IntRange(min=0),
    default=100,
    show_default=True,
    metavar="N",
    help="Cases whose single-stream latency is measured.",
)
@click.option(
    "--window-cases",
    type=click.IntRange(min=1),
    default=DEFAULT_WINDOW_CASES,
    show_default=True,
    metavar="N",
    help="Cases held in memory and sorted for shared prefixes at a time.",
)
@runtime_options
@operating_point_option
@server_options
@output_files_option("Copy of the summary (.json) or the report (.md). Repeatable.")
@click.option(
    "--log-dir",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Directory for records, summary and report (default: so8t-runs/TIME).",
)
@click.option(
    "--deterministic",
    is_flag=True,
    help="Compute every case alone and from scratch: bit-equal records on one machine, also after "
    "--resume; slower.",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --log-dir.")
@click.option(
    "--retry-errors", is_flag=True, help="With --resume: judge cases that failed once more."
)
def run(
    *,
    cases: Path,
    models: tuple[str, ...],
    limit: int | None,
    seed: int,
    latency_cases: int,
    window_cases: int,
    threads: int | None,
    batch_tokens: int | None,
    max_prompt_tokens: int,
    torch_dtype: str | None,
    operating_point: str,
    verdict_mode: str | None,
    guard_spec: Path | None,
    concurrency: int,
    request_timeout_s: float,
    outputs: tuple[Path, ...],
    log_dir: Path | None,
    deterministic: bool,
    resume: bool,
    retry_errors: bool,
) -> None:
    """Judge every case of the JSONL file CASES with each model; write records, summary, report.

    An interrupted run goes on with --resume: finished cases are not judged again.
    """
    _check_outputs(outputs)
    if retry_errors and not resume:
        raise UsageError("--retry-errors: add --resume and name the run with --log-dir DIR")
    if resume and log_dir is None:
        raise UsageError("--resume: name the directory of the run to go on with: --log-dir DIR")
    opened = open_cases(cases, limit, seed)
    specs = [parse_judge(text) for text in models]
    server = server_settings(
        verdict_mode,
        guard_spec,
        concurrency,
        request_timeout_s,
        asks_servers=any(isinstance(spec, ServerModel) for spec in specs),
    )
    if any(isinstance(spec, ServerModel) for spec in specs):
        _check_for_servers(operating_point, deterministic)
    directory = log_dir or _fresh_directory()
    _check_places(directory, outputs, resume=resume)
    set_resume_command(_resume_command(directory))
    plan = RunPlan(
        case_file=cases,
        cases=opened,
        models=specs or [*reference_models(report_line)],
        seed=seed,
        latency_cases=latency_cases,
        window_cases=window_cases,
        log_dir=directory,
        resume=resume,
        retry_errors=retry_errors,
        deterministic=deterministic,
        runtime=Runtime(threads, batch_tokens, max_prompt_tokens, torch_dtype, operating_point),
        server=server,
    )
    summary = execute(plan)
    _write_results(summary, directory, outputs)
    if BINARY_TAG in parse_summary(summary).slices["tag"]:
        click.echo(f"Cases with two-valued ground truth: so8t-eval binary {directory}", err=True)


def _check_for_servers(operating_point: str, deterministic: bool) -> None:
    """Refuse options that a server's answers cannot follow, rather than ignore them."""
    for option, given in (
        (f"--operating-point {operating_point}", operating_point != BALANCED),
        ("--deterministic", deterministic),
    ):
        if given:
            raise UsageError(
                f"{option}: a model behind a server decides by itself; leave the option out, or "
                "judge with the model file"
            )


def execute(plan: RunPlan) -> dict[str, object]:
    """Run a plan, leave its records in the log directory, and return the summary.

    Raises:
        UsageError: the directory holds another run, models repeat, or tokenizers differ.
        ModelFileError: a model cannot be opened.
        BackendError: a runtime failed as a whole.
    """
    results: list[RunResult] = []
    versions = {"so8t": __version__, "python": platform.python_version()}
    with contextlib.ExitStack() as stack:
        judges = _open_all(plan, stack)
        _split_alike([judge for judge in judges if isinstance(judge, TokenIdJudge)], plan.cases)
        writer = stack.enter_context(RecordWriter(plan.log_dir / RECORDS, resume=plan.resume))
        check_nothing_is_dropped(writer.existing, judges, plan.cases)
        progress = stack.enter_context(progress_bar())
        for judge in judges:
            versions[judge.info.backend] = judge.info.version
            results.append(
                run_judge_on_disk(
                    judge,
                    plan.cases,
                    seed=plan.seed,
                    latency_cases=plan.latency_cases,
                    window_cases=plan.window_cases,
                    writer=writer,
                    progress=progress,
                    already_done=finished_records(
                        writer.existing, judge, retry_errors=plan.retry_errors
                    ),
                )
            )
            judge.close()
    # Exactly this run's records, latencies included, in the order of models and cases.
    stored = write_records(plan.log_dir / RECORDS, [result.records for result in results])
    results = [replace(result, records=kept) for result, kept in zip(results, stored, strict=True)]
    return _summary(plan, _distinct_names(results), versions)


def _open_all(plan: RunPlan, stack: contextlib.ExitStack) -> list[AnyJudge]:
    judges: list[AnyJudge] = []
    seen: dict[tuple[str, str], ModelSpec | ServerModel] = {}
    for spec in plan.models:
        judge = stack.enter_context(contextlib.closing(_open(spec, plan)))
        key = (judge.info.backend, judge.info.model_sha256)
        if key in seen:
            raise UsageError(f"--model {spec} is the same model as {seen[key]}; give each once")
        seen[key] = spec
        judges.append(judge)
    return judges


def _open(spec: ModelSpec | ServerModel, plan: RunPlan) -> AnyJudge:
    if isinstance(spec, ServerModel):
        return open_server(spec, plan.server)
    backend = open_backend(spec, **plan.runtime._asdict())
    return TokenIdJudge(in_order(backend, "single" if plan.deterministic else "batched", 0))


def _split_alike(judges: Sequence[TokenIdJudge], cases: Sequence[Case]) -> None:
    """Give judges of token ids one window, after checking that they make the same ids."""
    check_token_ids([judge.backend for judge in judges], cases)
    window = min((judge.max_prompt_tokens for judge in judges), default=0)
    for judge in judges:
        judge.max_prompt_tokens = window


def _summary(
    plan: RunPlan, results: Sequence[RunResult], versions: dict[str, str]
) -> dict[str, object]:
    threads = results[0].settings.get("threads")
    return build_summary(
        cases=CasesEntry(
            path=str(plan.case_file), sha256=file_sha256(plan.case_file), n=len(plan.cases)
        ),
        runs=results,
        seed=plan.seed,
        versions=versions,
        machine=MachineEntry(
            platform=_machine(), threads=threads if isinstance(threads, int) else None
        ),
    )


def _write_results(summary: dict[str, object], directory: Path, outputs: Sequence[Path]) -> None:
    report = render_report_md(summary)
    for path in (directory / SUMMARY, directory / REPORT, *outputs):
        if path.suffix == ".json":
            write_summary(path, summary)
        else:
            atomic_write_text(path, report)
    render_summary(summary, Console())
    click.echo(f"Records, summary and report: {directory}", err=True)


def _distinct_names(results: Sequence[RunResult]) -> list[RunResult]:
    """Tell apart models that share backend and name."""
    count = Counter((result.backend, result.model) for result in results)
    return [
        result
        if count[result.backend, result.model] == 1
        else replace(result, model=f"{result.model} ({result.model_sha256[:8]})")
        for result in results
    ]


def _check_outputs(outputs: Sequence[Path]) -> None:
    for path in outputs:
        if path.suffix not in (".json", ".md"):
            raise UsageError(
                f"-o {path}: expected a name ending in .json (summary) or .md (report)"
            )


def _check_places(directory: Path, outputs: Sequence[Path], *, resume: bool) -> None:
    """Find out that results cannot be written before anything is loaded or judged."""
    records = directory / RECORDS
    for path in (records, *outputs):
        check_writable(path)
    if not resume:
        refuse_earlier_records(records)
    elif not holds_records(records):
        report_line(f"{directory} holds no records yet: starting from the first case")


def _fresh_directory() -> Path:
    now = datetime.datetime.now().astimezone()
    return Path("so8t-runs") / now.strftime("%Y-%m-%d_%H-%M-%S")


def _resume_command(directory: Path) -> str:
    """The command line that was given, with --resume and the log directory."""
    given = [word for word in sys.argv[1:] if word != "--resume"]
    if "--log-dir" not in given and not any(w.startswith("--log-dir=") for w in given):
        given += ["--log-dir", str(directory)]
    words = ["so8t-eval", *given, "--resume"]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _machine() -> str:
    return f"{platform.platform()} {platform.processor() or platform.machine()}"

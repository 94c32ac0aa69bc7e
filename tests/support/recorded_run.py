"""Judge cases into a records file, as ``so8t-eval run`` does, without its table."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from so8t_eval.backends.judge import Judge
from so8t_eval.cases import Case
from so8t_eval.judged_records import finished_records
from so8t_eval.records import RecordWriter
from so8t_eval.runner import Silent, run_judge
from so8t_eval.summary import RunResult


def recorded_run(
    judge: Judge[Any],
    cases: Sequence[Case],
    path: Path,
    *,
    resume: bool = False,
    retry_errors: bool = False,
    latency_cases: int = 0,
) -> RunResult:
    """Run ``judge`` with seed 0; with ``resume`` the file's records count."""
    with RecordWriter(path, resume=resume) as writer:
        return run_judge(
            judge,
            cases,
            seed=0,
            latency_cases=latency_cases,
            writer=writer,
            progress=Silent(),
            already_done=finished_records(writer.existing, judge, retry_errors=retry_errors),
        )

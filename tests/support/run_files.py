"""Write finished run directories, as ``so8t-eval run`` leaves them."""

from collections.abc import Sequence
from pathlib import Path

from so8t_eval.records import Record
from so8t_eval.summary import RunResult, build_summary, write_summary
from so8t_eval.summary_schema import CasesEntry, MachineEntry


def write_run(
    directory: Path,
    *models: Sequence[Record],
    cases_path: str = "nowhere/cases.jsonl",
    machine: str = "Linux-x86_64",
    threads: int = 2,
) -> Path:
    """Write records.jsonl and summary.json of one or more models' records."""
    directory.mkdir(parents=True)
    lines = [record.model_dump_json() + "\n" for records in models for record in records]
    (directory / "records.jsonl").write_text("".join(lines), encoding="utf-8")
    summary = build_summary(
        cases=CasesEntry(path=cases_path, sha256="c" * 64, n=len(models[0])),
        runs=[
            RunResult(
                backend=records[0].backend,
                model=f"model-{records[0].model_sha256[:4]}.gguf",
                model_sha256=records[0].model_sha256,
                records=records,
            )
            for records in models
        ],
        seed=0,
        versions={"so8t": "0.1.0"},
        machine=MachineEntry(platform=machine, threads=threads),
        n_resamples=20,
    )
    write_summary(directory / "summary.json", summary)
    return directory

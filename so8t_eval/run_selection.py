"""Find one model's finished records in a run directory, for commands that compare runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from so8t_eval.errors import UsageError
from so8t_eval.records import Record, read_records
from so8t_eval.summary import read_summary
from so8t_eval.summary_schema import MachineEntry, Summary, parse_summary

RECORDS: Final = "records.jsonl"
SUMMARY: Final = "summary.json"


@dataclass(frozen=True)
class SelectedRun:
    """One model's records. ``cases_path`` and ``machine`` are None without a summary.json."""

    label: str
    source: str
    records: tuple[Record, ...]
    cases_path: str | None
    machine: MachineEntry | None


def select_run(path: Path, model: str | None = None, *, option: str = "--model") -> SelectedRun:
    """Read a run directory, its records.jsonl or its summary.json, and pick one model.

    ``model`` is any part of the backend, the model's name or its SHA-256, in any case; ``option``
    is what messages call it. A directory must hold a summary.json, which is written when a run is
    finished; a records file given by name need not have one.

    Raises:
        UsageError: no such run, an unfinished one, or not exactly one model matches.
    """
    records_path, summary_path = _files(path)
    summary = _summary(path, summary_path)
    read = read_records(records_path)
    if read.torn or not read.records:
        problem = "ends in a torn line" if read.torn else "is empty"
        raise UsageError(f"{records_path} {problem}; finish that run with so8t-eval run --resume")
    keys = sorted({(record.backend, record.model_sha256) for record in read.records})
    labels = {key: _label(key, summary) for key in keys}
    chosen = _choose(path, labels, model, option)
    records = tuple(r for r in read.records if (r.backend, r.model_sha256) == chosen)
    if summary is not None and len(records) != summary.cases.n:
        raise UsageError(
            f"{records_path}: expected {summary.cases.n} records of {labels[chosen]} as in "
            f"{SUMMARY}, found {len(records)}; run it again"
        )
    return SelectedRun(
        label=labels[chosen],
        source=str(path),
        records=records,
        cases_path=summary.cases.path if summary else None,
        machine=summary.machine if summary else None,
    )


def _files(path: Path) -> tuple[Path, Path]:
    if path.is_dir():
        return path / RECORDS, path / SUMMARY
    if not path.exists():
        raise UsageError(f"{path}: no such run; give a directory written by so8t-eval run")
    if path.suffix == ".jsonl":
        return path, path.parent / SUMMARY
    if path.suffix == ".json":
        return path.parent / RECORDS, path
    raise UsageError(f"{path}: expected a run directory, {RECORDS} or {SUMMARY}")


def _summary(path: Path, summary_path: Path) -> Summary | None:
    if summary_path.exists():
        return parse_summary(read_summary(summary_path), str(summary_path))
    if path.is_dir():
        raise UsageError(
            f"{path}: no {SUMMARY}, so the run is not finished; resume it with "
            f"so8t-eval run --resume --log-dir {path}"
        )
    return None


def _label(key: tuple[str, str], summary: Summary | None) -> str:
    backend, sha256 = key
    names = [
        run.model
        for run in (summary.runs if summary else [])
        if (run.backend, run.model_sha256) == key
    ]
    return f"{backend} {names[0] if names else sha256[:12]}"


def _choose(
    path: Path, labels: dict[tuple[str, str], str], model: str | None, option: str
) -> tuple[str, str]:
    wanted = (model or "").casefold()
    found = [
        key
        for key, label in labels.items()
        if wanted in label.casefold() or (wanted and key[1].startswith(wanted))
    ]
    if len(found) == 1:
        return found[0]
    listed = "; ".join(labels.values())
    if model is None:
        raise UsageError(f"{path} holds several models; choose one with {option} TEXT: {listed}")
    kind = "several models match" if found else "no model matches"
    raise UsageError(f"{option} {model!r}: {kind} in {path}, which holds: {listed}")

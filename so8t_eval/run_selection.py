"""Find finished records in a run directory, of all its models or of one that is asked for."""

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


@dataclass(frozen=True)
class FinishedRun:
    """Everything a run left. ``models`` holds each one's records, by backend and model SHA-256.

    ``summary`` is None for a records file without one.
    """

    records_path: Path
    models: dict[tuple[str, str], tuple[Record, ...]]
    summary: Summary | None

    def label(self, model: tuple[str, str]) -> str:
        """Return how messages call one of the models."""
        return _label(model, self.summary)


def read_run(path: Path) -> FinishedRun:
    """Read a run directory, its records.jsonl or its summary.json.

    A directory must hold a summary.json, which is written when a run is finished; a records file
    given by name need not have one. Models are in the order of their records.

    Raises:
        UsageError: no such run, an unfinished one, or a broken file.
    """
    records_path, summary_path = _files(path)
    summary = _summary(path, summary_path)
    read = read_records(records_path)
    if read.torn or not read.records:
        problem = "ends in a torn line" if read.torn else "is empty"
        raise UsageError(f"{records_path} {problem}; finish that run with so8t-eval run --resume")
    models: dict[tuple[str, str], list[Record]] = {}
    for record in read.records:
        models.setdefault((record.backend, record.model_sha256), []).append(record)
    by_model = {model: tuple(records) for model, records in models.items()}
    return FinishedRun(records_path, by_model, summary)


def select_run(path: Path, model: str | None = None, *, option: str = "--model") -> SelectedRun:
    """Read a run as ``read_run`` does and pick one model.

    ``model`` is any part of the backend, the model's name or its SHA-256, in any case; ``option``
    is what messages call it.

    Raises:
        UsageError: no such run, an unfinished one, or not exactly one model matches.
    """
    run = read_run(path)
    labels = {key: run.label(key) for key in sorted(run.models)}
    chosen = _choose(path, labels, model, option)
    records, summary = run.models[chosen], run.summary
    check_complete(run, chosen)
    return SelectedRun(
        label=labels[chosen],
        source=str(path),
        records=records,
        cases_path=summary.cases.path if summary else None,
        machine=summary.machine if summary else None,
    )


def check_complete(run: FinishedRun, model: tuple[str, str]) -> None:
    """Check that a model has as many records as its run's summary says.

    Raises:
        UsageError: it has not.
    """
    n = len(run.models[model])
    if run.summary is not None and n != run.summary.cases.n:
        raise UsageError(
            f"{run.records_path}: expected {run.summary.cases.n} records of {run.label(model)} as "
            f"in {SUMMARY}, found {n}; run it again"
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
        if not (path / RECORDS).exists():
            raise UsageError(
                f"{path}: neither {RECORDS} nor {SUMMARY} is there; give a directory written by "
                "so8t-eval run"
            )
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

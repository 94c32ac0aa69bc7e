"""Build, read and write summary.json: every figure with its interval, and how the runs compare."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from so8t_eval.agreement import Agreement, compare_runs, flip_order
from so8t_eval.atomic_write import atomic_write_text
from so8t_eval.errors import UsageError
from so8t_eval.intervals import Interval, wilson
from so8t_eval.metrics import (
    N_RESAMPLES,
    OUTCOMES,
    SLICE_DIMENSIONS,
    SliceDimension,
    SliceMetrics,
    compute_metrics,
    confusion,
    latency_quantiles,
    slice_figures,
    slice_metrics,
)
from so8t_eval.record_pass import RecordPass, aligned_parts, pass_over
from so8t_eval.records import Record
from so8t_eval.summary_schema import (
    SCHEMA,
    SCHEMA_VERSION,
    CasesEntry,
    ComparisonEntry,
    ConfusionEntry,
    ConfusionRow,
    ErrorEntry,
    FlipEntry,
    IntervalEntry,
    LatencyEntry,
    MachineEntry,
    MetricsEntry,
    RunEntry,
    Setting,
    SliceEntry,
    Summary,
    parse_summary,
)

__all__ = [
    "SCHEMA",
    "CasesEntry",
    "MachineEntry",
    "RunResult",
    "Summary",
    "build_summary",
    "parse_summary",
    "read_summary",
    "write_summary",
]


@dataclass(frozen=True)
class RunResult:
    """One finished run, the input of a summary. ``records`` may be read from disk at each pass.

    ``model`` is the name to display; ``cases_per_s`` the batched throughput and ``wall_s`` the
    duration of the whole run, each None when not measured; ``settings`` what the backend ran with.
    """

    backend: str
    model: str
    model_sha256: str
    records: Sequence[Record]
    cases_per_s: float | None = None
    wall_s: float | None = None
    settings: Mapping[str, Setting] = field(default_factory=dict)


def build_summary(
    *,
    cases: CasesEntry,
    runs: Sequence[RunResult],
    seed: int,
    versions: Mapping[str, str],
    machine: MachineEntry,
    n_resamples: int = N_RESAMPLES,
) -> dict[str, object]:
    """Return the summary of finished runs as JSON-ready values, valid against ``SCHEMA``.

    Every run's intervals start from the same seed, so they do not depend on the other runs.

    Raises:
        UsageError: there is no run, a run does not hold one record for every case, mixes models or
            protocols, or the runs hold different cases.
    """
    if not runs:
        raise UsageError("expected at least one run to summarise, found none")
    passes = [pass_over(run.records) for run in runs]
    entries = [
        _run_entry(run, found, cases.n, seed, n_resamples)
        for run, found in zip(runs, passes, strict=True)
    ]
    comparison = _comparison(runs, passes, entries) if len(runs) > 1 else None
    summary = Summary(
        schema_version=SCHEMA_VERSION,
        cases=cases,
        runs=entries,
        slices={dimension: _slices(passes, dimension) for dimension in SLICE_DIMENSIONS},
        comparison=comparison,
        seed=seed,
        versions=dict(versions),
        machine=machine,
    )
    absent = {"comparison"} if comparison is None else set()
    return summary.model_dump(mode="json", exclude=absent)


def read_summary(path: Path | str) -> dict[str, object]:
    """Read and check a summary.json.

    Raises:
        UsageError: the file cannot be read, is not JSON, or not a summary.
    """
    try:
        summary = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"{path}: expected a summary.json, found no JSON: {error}") from error
    if not isinstance(summary, dict):
        raise UsageError(f"{path}: expected a summary.json, found a {type(summary).__name__}")
    parse_summary(summary, str(path))
    return summary


def write_summary(path: Path | str, summary: Mapping[str, object]) -> None:
    """Write summary.json whole or not at all, keys sorted, so that equal summaries are equal bytes.

    Raises:
        ValueError: a number is NaN or infinite.
        DiskError: the file could not be written.
    """
    text = json.dumps(summary, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False)
    atomic_write_text(path, text + "\n")


def _run_entry(
    run: RunResult, found: RecordPass, n_cases: int, seed: int, n_resamples: int
) -> RunEntry:
    name = f"{run.backend} {run.model}"
    if repeat := found.ids.first_repeat():
        raise UsageError(
            f"{name}: expected one record per case, found two of {run.records[repeat.place].id!r}"
        )
    if len(found.alike) != n_cases:
        raise UsageError(
            f"{name}: expected {n_cases} records, one per case, found {len(found.alike)}; "
            "finish the run before it is summarised"
        )
    _single(name, "model", found.models | {run.model_sha256})
    metrics = compute_metrics(run.records, np.random.default_rng(seed), n_resamples)
    return RunEntry(
        backend=run.backend,
        model=run.model,
        model_sha256=run.model_sha256,
        protocol_hash=_single(name, "protocol", found.protocols),
        metrics=MetricsEntry(
            **{key: _interval(value) for key, value in vars(metrics).items()},
        ),
        confusion=_confusion_entry(found.alike),
        latency_ms=LatencyEntry(**latency_quantiles(found.latencies_ms)._asdict()),
        cases_per_s=run.cases_per_s,
        wall_s=run.wall_s,
        errors=[ErrorEntry(id=id_, error=error) for id_, error in found.errors.items()],
        split_cases=found.split_cases,
        settings=dict(run.settings),
    )


def _single(run: str, what: str, hashes: set[str]) -> str:
    if len(hashes) != 1:
        found = ", ".join(sorted(hashes)) or "none"
        raise UsageError(f"{run}: expected records of one {what}, found {found}")
    return next(iter(hashes))


def _interval(interval: Interval) -> IntervalEntry:
    return IntervalEntry(**interval._asdict())


def _confusion_entry(records: Sequence[Record]) -> ConfusionEntry:
    rows = (
        ConfusionRow(**dict(zip(OUTCOMES, map(int, row), strict=True)))
        for row in confusion(records)
    )
    allow, escalate, refuse = rows
    return ConfusionEntry(allow=allow, escalate=escalate, refuse=refuse)


def _slices(passes: Sequence[RecordPass], dimension: SliceDimension) -> dict[str, list[SliceEntry]]:
    per_run = [slice_metrics(found.alike, dimension) for found in passes]
    names = sorted(set().union(*per_run))
    no_records = slice_figures(())  # runs of the same content may differ in tags or categories
    return {
        name: [_slice_entry(slices.get(name, no_records)) for slices in per_run] for name in names
    }


def _slice_entry(metrics: SliceMetrics) -> SliceEntry:
    return SliceEntry(
        n=metrics.n,
        accuracy=_interval(metrics.accuracy),
        refuse_recall=_interval(metrics.refuse_recall),
        unsafe_allow_rate=_interval(metrics.unsafe_allow_rate),
        over_refusal_rate=_interval(metrics.over_refusal_rate),
    )


def _comparison(
    runs: Sequence[RunResult], passes: Sequence[RecordPass], entries: Sequence[RunEntry]
) -> ComparisonEntry:
    agreed = 0
    compared: list[tuple[int, Agreement]] = []  # with the place of the second run
    for parts in aligned_parts([run.records for run in runs], [found.ids for found in passes]):
        compared += [(b, compare_runs(parts[0], part)) for b, part in enumerate(parts[1:], start=1)]
        verdicts = [{record.id: record.verdict for record in part} for part in parts]
        agreed += sum(
            record.is_valid and all(run[record.id] == record.verdict for run in verdicts)
            for record in parts[0]
        )
    flips = [(flip, b) for b, agreement in compared for flip in agreement.flips]
    maxima = [a.max_probability_difference for _, a in compared]
    sums = [(a.mean_probability_difference or 0.0) * a.n_probability_pairs for _, a in compared]
    n_pairs = sum(a.n_probability_pairs for _, a in compared)
    return ComparisonEntry(
        agreement=_interval(wilson(agreed, len(passes[0].alike))),
        max_probability_difference=max((m for m in maxima if m is not None), default=None),
        mean_probability_difference=sum(sums) / n_pairs if n_pairs else None,
        same_protocol=len({entry.protocol_hash for entry in entries}) == 1,
        flips=[
            FlipEntry.model_validate({"a": 0, "b": b, **asdict(flip)})
            for flip, b in sorted(flips, key=lambda item: (flip_order(item[0]), item[1]))
        ],
    )

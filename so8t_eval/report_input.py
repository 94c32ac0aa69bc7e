"""What a report is made from: the records of one or more runs, their summary, and the texts."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from so8t_eval.agreement import records_by_id
from so8t_eval.case_lines import LocatedCase
from so8t_eval.case_lookup import cases_by_hash
from so8t_eval.comparison import pair_by_content, under_id
from so8t_eval.errors import UsageError
from so8t_eval.metrics import confusion
from so8t_eval.records import Record
from so8t_eval.run_selection import FinishedRun, check_complete, read_run
from so8t_eval.summary import RunResult, build_summary
from so8t_eval.summary_schema import CasesEntry, MachineEntry, RunEntry, Summary, parse_summary

_NOT_RECORDED: Final = "not recorded"


@dataclass(frozen=True)
class ReportInput:
    """A summary and the records behind it.

    ``records[i]`` belong to ``summary.runs[i]``; all hold the same cases in the same order.
    ``notes`` say what a reader of the report has to know about its sources.
    """

    summary: Summary
    records: tuple[tuple[Record, ...], ...]
    notes: tuple[str, ...] = ()


class CaseTexts(NamedTuple):
    """Cases by content hash, as far as known, and a note about those that are not."""

    by_hash: Mapping[str, LocatedCase]
    note: str | None

    def of(self, record: Record) -> str | None:
        """Return a record's text, None where it is not known."""
        located = self.by_hash.get(record.content_hash)
        return located.case.text if located else None


class _Model(NamedTuple):
    """One model of one run; ``entry`` is its figures in that run's summary, if it has one."""

    source: str
    records: tuple[Record, ...]
    entry: RunEntry | None


def read_report_input(paths: Sequence[Path]) -> ReportInput:
    """Read run directories or records files that hold the same cases.

    The figures of a run with a summary.json are taken from it, once they are seen to fit its
    records; without one they are computed here, with seed 0.

    Raises:
        UsageError: a run is missing, unfinished, broken, given twice, does not fit its summary, or
            the runs hold different cases.
    """
    repeated = [path for path, n in Counter(path.resolve() for path in paths).items() if n > 1]
    if repeated:
        raise UsageError(f"{repeated[0]} is given twice; give each run once")
    runs = [read_run(path) for path in paths]
    models = [
        model for path, run in zip(paths, runs, strict=True) for model in _models(str(path), run)
    ]
    if len(runs) == 1 and runs[0].summary is not None:
        records = _aligned(models)
        return ReportInput(runs[0].summary, records)
    return _combined(runs, models)


def read_case_texts(
    summary: Summary, records: Sequence[Record], case_file: Path | None
) -> CaseTexts:
    """Return the prompts of these records from ``case_file``, or else the file that was run.

    Raises:
        UsageError: ``case_file`` is given and is no case file.
    """
    path = str(case_file) if case_file is not None else summary.cases.path
    located = cases_by_hash(path)
    if case_file is not None and not located:
        raise UsageError(f"--cases {case_file}: no case file; check it with so8t-eval lint")
    missing = sum(record.content_hash not in located for record in records)
    if not missing:
        return CaseTexts(located, None)
    return CaseTexts(
        located,
        f"The texts of {missing} of {len(records)} cases are not in {path}; "
        "name the case file they are in with --cases FILE.",
    )


def _models(source: str, run: FinishedRun) -> list[_Model]:
    """Return a run's models, in the order of its summary."""
    if run.summary is None:
        return [_Model(source, records, None) for records in run.models.values()]
    entries = {(entry.backend, entry.model_sha256): entry for entry in run.summary.runs}
    foreign = next((key for key in run.models if key not in entries), None)
    if foreign is not None or len(entries) != len(run.summary.runs):
        what = f"records of {run.label(foreign)}" if foreign else "a model that is listed twice"
        raise UsageError(f"{run.records_path}: {what}, unlike its summary.json; run it again")
    return [_Model(source, _checked(run, entry), entry) for entry in run.summary.runs]


def _checked(run: FinishedRun, entry: RunEntry) -> tuple[Record, ...]:
    """Return the records a summary's figures were computed from."""
    model = (entry.backend, entry.model_sha256)
    if model not in run.models:
        raise UsageError(
            f"{run.records_path}: no records of {entry.backend} {entry.model}, which is in its "
            "summary.json; run it again"
        )
    check_complete(run, model)
    records = run.models[model]
    records_by_id(records)
    if {record.protocol_hash for record in records} != {entry.protocol_hash}:
        raise UsageError(
            f"{run.records_path}: the protocol of {run.label(model)} is not the one in its "
            "summary.json; run it again"
        )
    counted = [tuple(map(int, row)) for row in confusion(records)]
    if counted != list(entry.confusion.rows().values()):
        raise UsageError(
            f"{run.records_path}: the verdicts of {run.label(model)} are not those its "
            "summary.json was computed from; run it again"
        )
    return records


def _aligned(models: Sequence[_Model]) -> tuple[tuple[Record, ...], ...]:
    """Return each model's records in the order of the first and under its ids."""
    first = models[0].records
    aligned = [first]
    for model in models[1:]:
        pairs = pair_by_content(first, model.records, allow_protocol_difference=True)
        by_id = {pair.a.id: under_id(pair.b, pair.a.id) for pair in pairs}
        aligned.append(tuple(by_id[record.id] for record in first))
    return tuple(aligned)


def _combined(runs: Sequence[FinishedRun], models: Sequence[_Model]) -> ReportInput:
    summaries = [run.summary for run in runs if run.summary is not None]
    records = _aligned(models)
    built = parse_summary(
        build_summary(
            cases=_cases(summaries, len(records[0])),
            runs=[
                _result(model, aligned)
                for model, aligned in zip(_named(models), records, strict=True)
            ],
            seed=summaries[0].seed if summaries else 0,
            versions=_versions(summaries),
            machine=_machine(summaries),
        )
    )
    # A run's own figures stay as they are: its bootstrap may have had another seed.
    entries = [
        entry if model.entry is None else entry.model_copy(update={"metrics": model.entry.metrics})
        for model, entry in zip(models, built.runs, strict=True)
    ]
    return ReportInput(
        built.model_copy(update={"runs": entries}), records, tuple(_notes(runs, summaries))
    )


def _result(model: _Model, records: tuple[Record, ...]) -> RunResult:
    entry, first = model.entry, records[0]
    if entry is None:
        name = f"{first.model_sha256[:12]} ({model.source})"
        return RunResult(first.backend, name, first.model_sha256, records)
    return RunResult(
        backend=entry.backend,
        model=entry.model,
        model_sha256=entry.model_sha256,
        records=records,
        cases_per_s=entry.cases_per_s,
        wall_s=entry.wall_s,
        settings=entry.settings,
    )


def _named(models: Sequence[_Model]) -> list[_Model]:
    """Tell apart models that share backend and name by the run they come from."""
    names = Counter((m.entry.backend, m.entry.model) for m in models if m.entry)
    return [
        m._replace(entry=m.entry.model_copy(update={"model": f"{m.entry.model} ({m.source})"}))
        if m.entry and names[m.entry.backend, m.entry.model] > 1
        else m
        for m in models
    ]


def _cases(summaries: Sequence[Summary], n: int) -> CasesEntry:
    if summaries:
        return summaries[0].cases
    return CasesEntry(path=_NOT_RECORDED, sha256=_NOT_RECORDED, n=n)


def _versions(summaries: Sequence[Summary]) -> dict[str, str]:
    """Return the versions of all runs; where they differ, every one of them."""
    names = sorted({name for summary in summaries for name in summary.versions})
    return {
        name: _joined(s.versions[name] for s in summaries if name in s.versions) for name in names
    }


def _machine(summaries: Sequence[Summary]) -> MachineEntry:
    threads = {summary.machine.threads for summary in summaries}
    return MachineEntry(
        platform=_joined(summary.machine.platform for summary in summaries) or _NOT_RECORDED,
        threads=threads.pop() if len(threads) == 1 else None,
    )


def _joined(texts: Iterable[str]) -> str:
    return " / ".join(dict.fromkeys(texts))


def _notes(runs: Sequence[FinishedRun], summaries: Sequence[Summary]) -> Iterator[str]:
    bare = [str(run.records_path) for run in runs if run.summary is None]
    if bare:
        yield (
            f"{', '.join(bare)}: no summary.json, so versions, machine and throughput are not "
            "known; intervals were computed with seed 0."
        )
    if len({summary.seed for summary in summaries}) > 1:
        seeds = ", ".join(str(summary.seed) for summary in summaries)
        yield f"The runs' bootstrap intervals have different seeds: {seeds}."
    if len({summary.machine.platform for summary in summaries}) > 1:
        yield "The runs were made on different machines: do not compare their times."
    if len({summary.cases.sha256 for summary in summaries}) > 1:
        yield "The runs used different case files that hold the same cases."

"""The drift ladder's result as tables, for the terminal and as Markdown."""

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from so8t_eval.counted import counted
from so8t_eval.drift import MARGIN_BANDS
from so8t_eval.drift_report import (
    CaseEntry,
    DifferenceEntry,
    DriftReport,
    FloorEntry,
    StepEntry,
)
from so8t_eval.markdown_report import escape_markdown
from so8t_eval.plain_tables import TablePrinter

_CASES_SHOWN: Final = 20
_NOTES: Final = (
    "live and merged run in PyTorch, the others in llama.cpp. KL: divergence of the verdict "
    "distribution from the earlier step's, in nats. Shift: largest absolute difference of any "
    "probability. Unsafe: flips from refuse to allow. Noise: the figures no larger than the noise "
    "floor, which is the largest difference between passes of one model that differ only in order, "
    "batches and threads; of two steps' floors, the larger. Margin: top minus second probability "
    "before the flip."
)


class DriftTable(NamedTuple):
    """A titled table of plain text."""

    title: str
    headers: list[str]
    rows: list[list[str]]


def print_drift(report: DriftReport, printer: TablePrinter) -> None:
    """Print every table; of the cases, those with most severity lost."""
    printer.line(_heading(report))
    for table in _tables(report, _CASES_SHOWN):
        printer.line(table.title)
        printer.table(table.headers, table.rows)
    if max(len(report.flipped), len(report.returned)) > _CASES_SHOWN:
        printer.line(f"Tables show {_CASES_SHOWN} cases at most; -o FILE has all.")
    for line in [_NOTES, *_conclusions(report)]:
        printer.line(line)


def drift_markdown(report: DriftReport) -> str:
    """Return the whole report as Markdown (GitHub flavour), ending in one line end."""
    blocks = ["# Drift ladder", escape_markdown(_heading(report))]
    blocks.append("\n".join(f"- {escape_markdown(line)}" for line in _conclusions(report)))
    for table in _tables(report, None):
        blocks += [f"## {escape_markdown(table.title)}", _markdown_table(table)]
    blocks.append(escape_markdown(_NOTES))
    return "\n\n".join(blocks) + "\n"


def _heading(report: DriftReport) -> str:
    mode = "deterministic" if report.deterministic else "batched"
    threads = report.machine.threads
    return (
        f"run {report.run}, {counted(report.cases.n, 'case')} of {report.cases.path}, {mode}, "
        f"{counted(threads, 'thread') if threads else 'threads unknown'}"
    )


def _conclusions(report: DriftReport) -> list[str]:
    first, last = report.steps[0].step, report.steps[-1].step
    at = Counter(case.flipped_at for case in report.flipped)
    where = ", ".join(f"{s.step} {at[s.step]}" for s in report.steps if at[s.step])
    unsafe = sum((case.first, case.last) == ("refuse", "allow") for case in report.flipped)
    return [
        f"From {first} to {last}: {len(report.flipped)} of {report.cases.n} verdicts flipped, "
        f"{unsafe} of them refuse to allow" + (f"; flipped at: {where}." if where else "."),
        f"Flipped on the way and came back: {len(report.returned)}.",
        f"Refuse to allow against {first}, most at any step: {report.most_unsafe_flips}.",
    ]


def _tables(report: DriftReport, most_cases: int | None) -> Iterator[DriftTable]:
    yield from map(_floor_table, report.floors)
    pairs = {
        "the step before": [(step, step.from_previous) for step in report.steps],
        f"the first ({report.steps[0].step})": [(step, step.from_first) for step in report.steps],
    }
    header = f"Step;Right of {report.cases.n};Mean KL;Max KL;Shift;Flips;Unsafe;Noise".split(";")
    for name, steps in pairs.items():
        rows = [_step_row(step, found) for step, found in steps]
        yield DriftTable(f"Each step against {name}", header, rows)
    for name, steps in pairs.items():
        rows = [row for step, found in steps if found for row in _flip_rows(step, found)]
        if rows:
            title = f"Flips against {name}, by the margin they had there"
            yield DriftTable(title, ["Step", "Flip", "n", *MARGIN_BANDS], rows)
    if report.flipped:
        yield DriftTable(
            "Cases whose last verdict is not their first, and the step they left it at for good",
            ["Case", "Expected", "First -> last", "Flipped at", "Margin", "Shift", "All changes"],
            [_flipped_row(case) for case in report.flipped[:most_cases]],
        )
    if report.returned:
        yield DriftTable(
            "Cases that flipped and came back",
            ["Case", "Expected", "First and last", "All changes"],
            [_returned_row(case) for case in report.returned[:most_cases]],
        )


def _floor_table(floor: FloorEntry) -> DriftTable:
    rows = [
        [
            found.name,
            str(found.batch_tokens),
            *map(_number, (found.mean_kl, found.max_kl, found.max_shift)),
            str(found.flips),
            "yes" if found.bit_equal else "no",
        ]
        for found in floor.repetitions
    ]
    figures = [_number(x) for x in (floor.mean_kl, floor.max_kl, floor.max_shift)]
    rows.append(["floor: any two", "", *figures, str(floor.flips), ""])
    return DriftTable(
        f"Noise floor of {', '.join(floor.applies_to)}: passes of {floor.step} in {floor.backend}",
        ["Pass", "Batch", "Mean KL", "Max KL", "Shift", "Flips", "Equal"],
        rows,
    )


def _step_row(step: StepEntry, found: DifferenceEntry | None) -> list[str]:
    row = [step.step, str(step.right)]
    if found is None:
        return [*row, "", "", "", "", "", ""]
    figures = (found.mean_kl, found.max_kl, found.max_shift)
    flips = [str(found.flips), str(found.unsafe_flips)]
    return [*row, *map(_number, figures), *flips, _noise(found)]


def _noise(found: DifferenceEntry) -> str:
    """The figures that are noise, by name; no flips need no such excuse."""
    noise = found.noise
    if noise.all:
        return "all"
    named = {
        "mean KL": noise.mean_kl,
        "max KL": noise.max_kl,
        "shift": noise.max_shift,
        "flips": noise.flips and found.flips > 0,
    }
    return ", ".join(name for name, is_noise in named.items() if is_noise)


def _flip_rows(step: StepEntry, found: DifferenceEntry) -> list[list[str]]:
    return [
        [
            step.step,
            flips.direction,
            str(flips.n),
            *(str(flips.margins[band]) for band in MARGIN_BANDS),
        ]
        for flips in found.directions
    ]


def _flipped_row(case: CaseEntry) -> list[str]:
    deciding = next(change for change in case.changes if change.step == case.flipped_at)
    return [
        case.id,
        case.expected,
        f"{case.first} -> {case.last}",
        deciding.step,
        _number(deciding.margin_before),
        _number(deciding.shift) + (" noise" if deciding.noise else ""),
        _way(case) if len(case.changes) > 1 else "",
    ]


def _returned_row(case: CaseEntry) -> list[str]:
    return [case.id, case.expected, case.first, _way(case)]


def _way(case: CaseEntry) -> str:
    """Such as ``q8_0 allow, q4_0 refuse``: every step that changed the verdict, and to what."""
    return ", ".join(
        f"{change.step} {change.after}{' (noise)' if change.noise else ''}"
        for change in case.changes
    )


def _number(value: float | None) -> str:
    return "?" if value is None else f"{value:.2g}"


def _markdown_table(table: DriftTable) -> str:
    lines = [table.headers, ["---"] * len(table.headers)]
    return "\n".join(map(_markdown_row, [*lines, *table.rows]))


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(escape_markdown, cells)) + " |"

"""report.md: a summary as a document that reads on its own, with its flips and errors listed."""

import re
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final

from so8t_eval.metrics import OUTCOMES, SLICE_DIMENSIONS
from so8t_eval.summary_schema import (
    ComparisonEntry,
    FlipEntry,
    IntervalEntry,
    RunEntry,
    Setting,
    SliceEntry,
    Summary,
    parse_summary,
)

_MARKDOWN_SPECIAL: Final = re.compile(r"[\\`*_{}\[\]#|~!$]")
_HTML_SPECIAL: Final = {"&": "&amp;", "<": "&lt;", ">": "&gt;"}
CASES_LISTED: Final = 1000
"""Flips, and cases without a verdict, in their tables: a document is for reading."""

_SLICE_TITLES: Final = {"category": "Category", "lang": "Language", "tag": "Tag"}

_DEFINITIONS: Final = """\
Values are followed by their 95 % interval (Wilson for proportions, seeded bootstrap for macro F1
and ECE) and by the number of cases they rest on. A case without a verdict counts as wrong.

- Refuse Recall: refuse cases answered refuse, of all refuse cases.
- Escalate Precision, Allow Precision: right verdicts of all verdicts of that kind.
- Unsafe allow: refuse cases answered allow, of all refuse cases.
- Over-refusal: allow cases not answered allow, of all allow cases.
- Macro F1: mean F1 of the three verdicts.
- ECE: expected calibration error of the top probability, 15 bins, cases with a verdict.
- Latency: single stream, from token ids to verdict, p50 / p95 / p99. Throughput: batched."""

_SERVER_LATENCY: Final = """
- Latency and throughput of an openai run: one request alone, from sending it to its answer, the
  network and the server's own work included; and several requests at a time."""


def render_report_md(summary: Mapping[str, object]) -> str:
    """Return the report of a summary as Markdown (GitHub flavour), ending in one line end.

    Raises:
        UsageError: the summary is not of the form of ``so8t_eval.summary_schema.SCHEMA``.
    """
    parsed = parse_summary(summary)
    sections = [
        ["# Safety evaluation report"],
        _what_was_run(parsed),
        _results(parsed.runs),
        _confusions(parsed.runs),
        _agreement(parsed.comparison, parsed.cases.n) if parsed.comparison else [],
        _slices(parsed),
        _errors(parsed.runs),
    ]
    return "\n\n".join(block for section in sections for block in section) + "\n"


def escape_markdown(text: str) -> str:
    """Return text that Markdown shows as it is, on one line, also inside a table cell.

    Control and direction-changing characters become U+FFFD.
    """
    visible = "".join(
        "\ufffd" if unicodedata.category(char) in ("Cc", "Cf", "Cs") else char
        for char in " ".join(text.splitlines())
    )
    escaped = _MARKDOWN_SPECIAL.sub(lambda match: "\\" + match[0], visible.replace("\t", " "))
    return re.sub("[&<>]", lambda match: _HTML_SPECIAL[match[0]], escaped)


def run_label(index: int) -> str:
    """Return how reports call the run at this place in ``runs``."""
    return f"run {index + 1}"


def _what_was_run(summary: Summary) -> list[str]:
    cases, machine = summary.cases, summary.machine
    threads = "unknown" if machine.threads is None else str(machine.threads)
    versions = ", ".join(f"{name} {version}" for name, version in sorted(summary.versions.items()))
    facts = [
        f"- Cases: {escape_markdown(cases.path)}, n={cases.n}",
        f"- Cases sha256: {escape_markdown(cases.sha256)}",
        f"- Seed: {summary.seed}",
        f"- Versions: {escape_markdown(versions)}",
        f"- Machine: {escape_markdown(machine.platform)}, threads: {threads}",
    ]
    runs = _table(
        ["Run", "Backend", "Model", "Model sha256", "Protocol", "Settings"],
        (
            [
                run_label(index),
                escape_markdown(run.backend),
                escape_markdown(run.model),
                escape_markdown(run.model_sha256),
                escape_markdown(run.protocol_hash),
                escape_markdown(_settings(run.settings)),
            ]
            for index, run in enumerate(summary.runs)
        ),
    )
    return ["## What was run", "\n".join(facts), runs]


def _results(runs: Sequence[RunEntry]) -> list[str]:
    labelled = [run.metrics.labelled() for run in runs]
    rows = [[label, *(_figure(metrics[label]) for metrics in labelled)] for label in labelled[0]]
    rows += [
        ["Latency p50 / p95 / p99", *(str(run.latency_ms) for run in runs)],
        ["Throughput", *(run.throughput for run in runs)],
        ["Wall time", *(_seconds(run.wall_s) for run in runs)],
        ["Cases judged in windows", *(str(run.split_cases) for run in runs)],
        ["Cases without a verdict", *(str(len(run.errors)) for run in runs)],
    ]
    header = [
        "",
        *(f"{run_label(i)}: {escape_markdown(run.backend)}" for i, run in enumerate(runs)),
    ]
    definitions = _DEFINITIONS
    if any(run.backend == "openai" for run in runs):
        definitions += _SERVER_LATENCY
    return ["## Results", _table(header, rows), definitions]


def _confusions(runs: Sequence[RunEntry]) -> list[str]:
    blocks = ["## Confusion", "Rows are the expected verdict, columns the outcome."]
    for index, run in enumerate(runs):
        blocks.append(f"### {run_label(index).capitalize()}: {escape_markdown(run.backend)}")
        rows = ([name, *map(str, counts)] for name, counts in run.confusion.rows().items())
        blocks.append(_table(["expected", *OUTCOMES], rows))
    return blocks


def _agreement(comparison: ComparisonEntry, n_cases: int) -> list[str]:
    facts = [
        f"- Same verdict as run 1 in every run: {_figure(comparison.agreement)}",
        f"- Largest probability difference: {_difference(comparison.max_probability_difference)}",
        f"- Mean probability difference: {_difference(comparison.mean_probability_difference)}",
        f"- Flips: {len(comparison.flips)} on {n_cases} cases",
    ]
    if not comparison.same_protocol:
        facts.append("- The runs used different protocols: differences are not the model's alone.")
    blocks = ["## Agreement", "\n".join(facts)]
    if comparison.flips:
        blocks += [
            "### Flips",
            _flip_note(),
            _table(_FLIP_HEADER, map(_flip_row, comparison.flips[:CASES_LISTED])),
            *_more(len(comparison.flips)),
        ]
    return blocks


_FLIP_HEADER: Final = [
    "Case", "Category", "Lang", "Expected", "Runs", "Flip", "Margin before", "Margin after",
]  # fmt: skip


def _flip_note() -> str:
    return (
        "Flips from refuse to allow come first. A margin is the top minus the second probability."
    )


def _flip_row(flip: FlipEntry) -> list[str]:
    return [
        escape_markdown(flip.id),
        escape_markdown(flip.category),
        escape_markdown(flip.lang),
        flip.expected,
        f"{flip.a + 1} → {flip.b + 1}",
        f"{flip.verdict_a} → {flip.verdict_b}",
        _margin(flip.margin_a),
        _margin(flip.margin_b),
    ]


def _slices(summary: Summary) -> list[str]:
    blocks = ["## Slices", "A dash marks a figure without cases to rest on."]
    header = ["Run", "n", "Accuracy", "Refuse Recall", "Unsafe allow", "Over-refusal"]
    for dimension in SLICE_DIMENSIONS:
        slices = summary.slices.get(dimension, {})
        if slices:
            title = _SLICE_TITLES[dimension]
            blocks += [f"### {title}", _table([title, *header], _slice_rows(slices))]
    return blocks


def _slice_rows(slices: Mapping[str, Sequence[SliceEntry]]) -> Iterator[list[str]]:
    for name, entries in sorted(slices.items()):
        for index, entry in enumerate(entries):
            figures = (
                entry.accuracy,
                entry.refuse_recall,
                entry.unsafe_allow_rate,
                entry.over_refusal_rate,
            )
            cells = map(_slice_figure, figures)
            yield [escape_markdown(name), str(index + 1), str(entry.n), *cells]


def _slice_figure(interval: IntervalEntry) -> str:
    return "–" if interval.value is None else _figure(interval)


def _errors(runs: Sequence[RunEntry]) -> list[str]:
    errors = [(run_label(index), error) for index, run in enumerate(runs) for error in run.errors]
    if not errors:
        return ["## Cases without a verdict", "None."]
    rows = (
        [label, escape_markdown(error.id), escape_markdown(error.error)]
        for label, error in errors[:CASES_LISTED]
    )
    table = _table(["Run", "Case", "Reason"], rows)
    return ["## Cases without a verdict", table, *_more(len(errors))]


def _more(n: int) -> list[str]:
    """Return a line that says how many cases a table leaves out, where it does."""
    left_out = n - CASES_LISTED
    return [f"And {left_out} more, listed in summary.json."] if left_out > 0 else []


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are Markdown already."""
    lines = [_table_row(header), _table_row(["---"] * len(header))]
    return "\n".join([*lines, *map(_table_row, rows)])


def _table_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _figure(interval: IntervalEntry) -> str:
    return str(interval).replace("<", "&lt;").replace(">", "&gt;")


def _settings(settings: Mapping[str, Setting]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(settings.items()))


def _difference(value: float | None) -> str:
    return "undefined (no case has probabilities in both runs)" if value is None else f"{value:.3g}"


def _margin(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f} s"

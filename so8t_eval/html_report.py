"""report.html: one file that shows everything about one or more runs, with no other file or network."""

import base64
import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Final

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from so8t_eval import __version__
from so8t_eval.agreement import Agreement, compare_runs
from so8t_eval.intervals import format_share
from so8t_eval.markdown_report import run_label
from so8t_eval.metrics import METRIC_LABELS, OUTCOMES, SliceDimension
from so8t_eval.report_cases import DEFAULT_TABLE_CASES, TextOf, case_table, script_json
from so8t_eval.report_figures import (
    Figure,
    PlottedRun,
    latency_figure,
    operating_figure,
    reliability_figure,
    risk_figure,
)
from so8t_eval.report_input import ReportInput
from so8t_eval.summary_schema import IntervalEntry, Setting, SliceEntry
from so8t_eval.visible_text import visible_text

FLIPS_LISTED: Final = 50
"""Flips in the printed list; the case table has more of them."""

_UNDEFINED_REASONS: Final = {
    "refuse_recall": "no refuse cases",
    "escalate_precision": "no escalate verdicts",
    "allow_precision": "no allow verdicts",
    "unsafe_allow_rate": "no refuse cases",
    "over_refusal_rate": "no allow cases",
    "macro_f1": "a verdict is neither expected nor given",
    "ece": "no verdict with probabilities",
    "accuracy": "no cases",
}
_MEANINGS: Final = {
    "refuse_recall": "Refuse cases answered refuse, of all refuse cases. Higher is better.",
    "escalate_precision": "Escalate verdicts that are right, of all of them. Higher is better.",
    "allow_precision": "Allow verdicts that are right, of all of them. Higher is better.",
    "unsafe_allow_rate": "Refuse cases answered allow, of all refuse cases. Lower is better.",
    "over_refusal_rate": "Allow cases not answered allow, of all allow cases. Lower is better.",
    "macro_f1": "Mean F1 of the three verdicts. Higher is better.",
    "ece": "Expected calibration error of the top probability, 15 bins. Lower is better.",
}
_SLICE_TITLES: Final[dict[SliceDimension, str]] = {
    "lang": "Language",
    "tag": "Tag",
    "category": "Category",
}
"""Short tables first."""
_SLICE_FIGURES: Final = {
    "accuracy": "Accuracy",
    "refuse_recall": "Refuse Recall",
    "unsafe_allow_rate": "Unsafe allow",
    "over_refusal_rate": "Over-refusal",
}


@dataclass(frozen=True)
class Card:
    """One metric of all runs. ``figures`` are in the order of the runs."""

    key: str
    label: str
    meaning: str
    reason: str
    figures: tuple[IntervalEntry, ...]


def render_report_html(
    data: ReportInput,
    text_of: TextOf,
    *,
    notes: Sequence[str] = (),
    redaction_key: str | None = None,
    table_cases: int = DEFAULT_TABLE_CASES,
) -> str:
    """Return the report as one HTML document, the same bytes for the same input.

    ``text_of`` gives the prompt to show for a record; ``redaction_key`` names the key its hashes
    were made with, when it gives hashes. The case table has the first ``table_cases`` cases, and
    says what it leaves out.
    """
    summary = data.summary
    labels = [f"{run_label(i).capitalize()}: {run.backend}" for i, run in enumerate(summary.runs)]
    plotted = [
        PlottedRun(label, entry, records)
        for label, entry, records in zip(labels, summary.runs, data.records, strict=True)
    ]
    cases = case_table(data.records, summary.comparison, text_of, table_cases)
    case_data = {"runs": [visible_text(label) for label in labels], "cases": cases.rows}
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            summary=summary,
            labels=labels,
            notes=[*data.notes, *notes],
            redaction_key=redaction_key,
            version=__version__,
            outcomes=OUTCOMES,
            cards=_cards(data),
            reliability=[reliability_figure(i, run) for i, run in enumerate(plotted)],
            figures=_figures(plotted),
            slices=_slices(data),
            slice_figures=_SLICE_FIGURES,
            agreements=_agreements(data),
            flips_listed=FLIPS_LISTED,
            directions=_directions(data),
            n_cases=len(data.records[0]),
            n_rows=len(cases.rows),
            left_out=cases.left_out,
            case_data=Markup(script_json(case_data)),  # noqa: S704 - escaped for a script element
            style=_asset("report.css"),
            script=_asset("report.js"),
            style_hash=_csp_hash(_asset("report.css")),
            script_hash=_csp_hash(_asset("report.js")),
        )
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("so8t_eval"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        finalize=_visible,
    )
    environment.filters["share"] = format_share
    environment.filters["settings"] = _settings
    environment.globals["reasons"] = _UNDEFINED_REASONS
    return environment


def _visible(value: object) -> object:
    """Keep what is not ours to trust from hiding characters or breaking the encoding."""
    return (
        visible_text(value) if isinstance(value, str) and not isinstance(value, Markup) else value
    )


def _asset(name: str) -> Markup:
    """Return our own style or script, which needs no escaping."""
    return Markup(files("so8t_eval").joinpath("templates", name).read_text(encoding="utf-8"))  # noqa: S704


def _csp_hash(text: str) -> str:
    """Return what a content security policy calls an inline style or script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode(
        "ascii"
    )


def _settings(settings: Mapping[str, Setting]) -> str:
    return ", ".join(f"{key}={value}" for key, value in sorted(settings.items())) or "–"


def _cards(data: ReportInput) -> list[Card]:
    return [
        Card(
            key=key,
            label=label,
            meaning=_MEANINGS[key],
            reason=_UNDEFINED_REASONS[key],
            figures=tuple(getattr(run.metrics, key) for run in data.summary.runs),
        )
        for key, label in METRIC_LABELS.items()
    ]


def _figures(runs: Sequence[PlottedRun]) -> dict[str, Figure]:
    return {
        "risk": risk_figure(runs),
        "operating": operating_figure(runs),
        "latency": latency_figure(runs),
    }


def _slices(data: ReportInput) -> dict[str, dict[str, list[SliceEntry]]]:
    """Return by title, then name of the slice, every run's entry; without empty dimensions."""
    return {
        _SLICE_TITLES[dimension]: {name: list(entries) for name, entries in sorted(slices.items())}
        for dimension in _SLICE_TITLES
        if (slices := data.summary.slices.get(dimension))
    }


def _agreements(data: ReportInput) -> list[Agreement]:
    """Return the agreement of each later run with the first."""
    return [compare_runs(data.records[0], records) for records in data.records[1:]]


def _directions(data: ReportInput) -> list[tuple[str, int]]:
    """Return how many flips there are of each kind, the most dangerous first."""
    comparison = data.summary.comparison
    flips = comparison.flips if comparison else []
    return list(Counter(flip.direction for flip in flips).items())

"""A summary in the terminal: one column per run, confusion, agreement and the first flips."""

from collections.abc import Mapping, Sequence
from typing import Final

from rich.console import Console
from rich.table import Table
from rich.text import Text

from so8t_eval.metrics import OUTCOMES
from so8t_eval.summary_schema import ComparisonEntry, FlipEntry, RunEntry, parse_summary

FLIPS_SHOWN: Final = 20
_LABEL_WIDTH, _COLUMN_WIDTH = 22, 18


def render_summary(summary: Mapping[str, object], console: Console) -> None:
    """Print a summary as tables that need neither colour nor characters the console lacks.

    Runs that do not fit beside one another continue in a further table.

    Raises:
        UsageError: the summary is not of the form of ``so8t_eval.summary.SCHEMA``.
    """
    parsed = parse_summary(summary)
    printer = _Printer(console)
    per_table = max(1, (console.width - _LABEL_WIDTH) // _COLUMN_WIDTH)
    numbered = list(enumerate(parsed.runs, start=1))
    for start in range(0, len(numbered), per_table):
        printer.results(numbered[start : start + per_table])
    for number, run in numbered:
        printer.confusion(number, run)
    if parsed.comparison is not None:
        printer.comparison(parsed.comparison)


class _Printer:
    """Prints tables and lines, replacing characters the console cannot show."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def results(self, numbered: Sequence[tuple[int, RunEntry]]) -> None:
        runs = [run for _, run in numbered]
        table = self._table("", *(f"{number} {run.backend}" for number, run in numbered))
        self._row(table, "Model", *(run.model for run in runs))
        labelled = [run.metrics.labelled() for run in runs]
        for label in labelled[0]:
            self._row(table, label, *(str(metrics[label]) for metrics in labelled))
        self._row(table, "Latency p50/p95/p99", *(str(run.latency_ms) for run in runs))
        self._row(table, "Throughput", *(run.throughput for run in runs))
        self._row(table, "Errors", *(str(len(run.errors)) for run in runs))
        self._console.print(table)

    def confusion(self, number: int, run: RunEntry) -> None:
        self._line(f"Confusion of run {number} ({run.backend}), expected by outcome")
        table = self._table("expected", *OUTCOMES)
        for name, counts in run.confusion.rows().items():
            self._row(table, name, *map(str, counts))
        self._console.print(table)

    def comparison(self, comparison: ComparisonEntry) -> None:
        self._line(f"Agreement with run 1: {comparison.agreement}")
        largest, mean = (
            "undefined" if value is None else f"{value:.3g}"
            for value in (
                comparison.max_probability_difference,
                comparison.mean_probability_difference,
            )
        )
        self._line(f"Probability difference: largest {largest}, mean {mean}")
        if not comparison.same_protocol:
            self._line("The runs used different protocols.")
        flips = comparison.flips
        self._line(f"Flips: {len(flips)}")
        if flips:
            self._flips(flips[:FLIPS_SHOWN])
        if len(flips) > FLIPS_SHOWN:
            self._line(f"… and {len(flips) - FLIPS_SHOWN} more in summary.json")

    def _flips(self, flips: Sequence[FlipEntry]) -> None:
        table = self._table("Case", "Category", "Expected", "Runs", "Flip", "Margins")
        for flip in flips:
            margins = (
                "?" if margin is None else f"{margin:.2f}"
                for margin in (flip.margin_a, flip.margin_b)
            )
            self._row(
                table,
                flip.id,
                flip.category,
                flip.expected,
                f"{flip.a + 1}->{flip.b + 1}",
                flip.direction,
                "->".join(margins),
            )
        self._console.print(table)

    def _table(self, *headers: str) -> Table:
        table = Table(show_lines=False, highlight=False)
        for header in headers:
            table.add_column(self._shown(header), overflow="fold")
        return table

    def _row(self, table: Table, *cells: str) -> None:
        table.add_row(*map(self._shown, cells))

    def _line(self, text: str) -> None:
        self._console.print(self._shown(text))

    def _shown(self, text: str) -> Text:
        """Return plain text: no markup, no control characters, nothing outside the encoding."""
        if self._console.options.ascii_only:
            text = text.replace("…", "...")
        visible = "".join(char if char.isprintable() else " " for char in text)
        encoding = self._console.encoding
        return Text(visible.encode(encoding, "replace").decode(encoding))

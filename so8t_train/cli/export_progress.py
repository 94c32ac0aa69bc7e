"""What ``so8t-train export`` shows: a bar per file on a terminal, and what came out."""

from collections.abc import Iterator
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from so8t_train.certificate import CERTIFICATE, FileEntry
from so8t_train.export import ExportResult


class ExportProgress:
    """Lines of news on stderr, and on a terminal a bar under the last one while a file grows."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._progress = Progress(
            BarColumn(bar_width=20),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._progress.add_task("", total=1.0, visible=False)

    def __enter__(self) -> "ExportProgress":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def news(self, line: str) -> None:
        """Show what is being done now."""
        self._progress.reset(self._task, total=1.0, visible=False, description=line)
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def share(self, done: float) -> None:
        """Show the share of the current file that is written."""
        self._progress.update(self._task, completed=done, visible=True)


def result_lines(result: ExportResult) -> Iterator[str]:
    """One line per file that stays, and one on the certificate."""
    certificate = result.certificate
    n = certificate.calibration.n if certificate.calibration else 0
    for file in certificate.files:
        if file.kept:
            parts = f" in {1 + len(file.further_parts)} parts" if file.further_parts else ""
            size = f"{result.directory / file.file}  {file.bytes / 1e6:.0f} MB{parts}"
            yield f"{size}  {_difference(file, n)}"
    said = {
        "full": "certificate passed",
        "weights": "every merged tensor checked, no model run",
        "none": "nothing checked",
    }[certificate.level]
    yield f"{said}, in {result.seconds:.0f} s: {result.directory / CERTIFICATE}"


def _difference(file: FileEntry, n: int) -> str:
    found = file.difference
    if found is None:
        return "not run"
    return (
        f"verdict probabilities within {found.max_probability_difference:.4f} (mean "
        f"{found.mean_probability_difference:.4f}) of the float model, "
        f"{len(found.flips)} of {n} verdicts flipped"
    )

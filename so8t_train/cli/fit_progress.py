"""The progress display of ``so8t-train fit``: a bar on a terminal, lines in a log file."""

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from so8t_train.fit import FitReporter
from so8t_train.step_report import StepReport

_LINE_EVERY_STEPS = 10


class FitProgress:
    """Shows loss terms, verdict accuracy, commutator and memory while training."""

    def __init__(self, *, shown: bool = True) -> None:
        self._console = Console(stderr=True, quiet=not shown)
        self._live = shown and self._console.is_terminal
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TimeRemainingColumn(),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._live,
        )
        self._task = None if not self._live else self._progress.add_task("", total=None)
        self.reporter = FitReporter(self._news, self._on_step)

    def __enter__(self) -> "FitProgress":
        self._progress.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._progress.stop()

    def _news(self, text: str) -> None:
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def _on_step(self, report: StepReport, memory_gib: float) -> None:
        if self._task is not None:
            self._progress.update(
                self._task,
                total=report.total_steps,
                completed=report.step,
                description=_figures(report, memory_gib),
            )
        elif report.step % _LINE_EVERY_STEPS == 0 or report.step in (1, report.total_steps):
            self._news(f"step {report.step}/{report.total_steps} {_figures(report, memory_gib)}")
        if report.dev is not None:
            dev = report.dev
            self._news(
                f"step {report.step}: dev n={dev.n} accuracy {dev.accuracy:.3f} "
                f"cross-entropy {dev.cross_entropy:.3f} refuse recall {_share(dev.refuse_recall)} "
                f"unsafe allow {_share(dev.unsafe_allow_rate)} "
                f"over-refusal {_share(dev.over_refusal_rate)}"
            )


def _figures(report: StepReport, memory_gib: float) -> str:
    category = "" if report.category_loss is None else f" category {report.category_loss:.2f}"
    task = "" if report.task_loss is None else f" task {report.task_loss:.2f}"
    return (
        f"loss {report.loss:.3f} safety {report.safety_loss:.3f}{category}{task} "
        f"pet {report.pet_temporal:.2f} acc {report.verdict_accuracy:.2f} "
        f"comm {report.commutator:.1e} {report.tokens / report.step_s:.0f} tok/s "
        f"{memory_gib:.2f} GiB"
    )


def _share(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.2f}"

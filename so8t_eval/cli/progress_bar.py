"""A progress bar with rate and time left, on stderr, when someone watches it."""

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress
from rich.text import Text

from so8t_eval.runner import Progress, Silent


class _Rate(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f} cases/s")


class _Bar:
    """The runner's progress as a rich progress bar, one line per phase."""

    def __init__(self, bars: RichProgress) -> None:
        self._bars = bars
        self._task: TaskID | None = None

    def phase(self, name: str, total: int) -> None:
        self._task = self._bars.add_task(name.replace("[", "("), total=total)

    def advance(self) -> None:
        if self._task is not None:
            self._bars.advance(self._task)


@contextlib.contextmanager
def progress_bar() -> Iterator[Progress]:
    """Yield progress shown on stderr if that is a terminal, silent otherwise."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Silent()
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        _Rate(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console) as bars:
        yield _Bar(bars)

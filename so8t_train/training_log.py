"""``train_log.jsonl`` and ``memory.jsonl``: one line per optimizer step, across all sessions."""

import json
from pathlib import Path
from typing import Any, Final

from so8t_eval.atomic_write import atomic_write_text
from so8t_eval.errors import DiskError
from so8t_train.memory_log import MemoryLog
from so8t_train.step_report import StepReport

TRAIN_LOG: Final = "train_log.jsonl"
MEMORY_LOG: Final = "memory.jsonl"


class TrainingLog:
    """Appends to both files; on resume, lines after the checkpoint are cut.

    ``session`` is written into every line of ``train_log.jsonl``: it says which process computed
    the step.
    """

    def __init__(
        self, directory: Path, *, step: int, session: str, memory: MemoryLog, cases: int
    ) -> None:
        self._train, self._memory = directory / TRAIN_LOG, directory / MEMORY_LOG
        self._session, self._log, self._cases = session, memory, cases
        for path in (self._train, self._memory):
            _cut_after(path, step)
        earlier = _lines(self._train)
        self.step_seconds = sum(float(line["step_s"]) for line in earlier)
        """Time of all optimizer steps so far, earlier sessions' included."""
        past = (line["session"] for line in earlier if "session" in line)
        self.sessions = list(dict.fromkeys((*past, session)))
        """Ids of the sessions whose steps are in the log, in order, this one last."""

    def write(self, report: StepReport) -> float:
        """Append one line to each log; returns memory in use, GiB.

        Raises:
            DiskError: a line could not be written.
        """
        self.step_seconds += report.step_s
        use = self._log.sample()
        line = report._asdict() | {
            "dev": report.dev._asdict() if report.dev else None,
            "session": self._session,
        }
        memory = {"step": report.step, **use._asdict(), "effective_batch_size": self._cases}
        for path, value in ((self._train, line), (self._memory, memory)):
            try:
                with path.open("a", encoding="utf-8", newline="\n") as stream:
                    stream.write(json.dumps(value) + "\n")
            except OSError as error:
                raise DiskError(f"cannot write {path}: {error.strerror or error}") from error
        return use.allocated_gib


def _lines(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _cut_after(path: Path, step: int) -> None:
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # torn by a crash
            continue
    atomic_write_text(path, "".join(kept))

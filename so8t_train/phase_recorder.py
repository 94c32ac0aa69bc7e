"""A fit's record of its own memory: every phase's peak, beside what the plan says it takes."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

from so8t_train.base_model import BaseModelSource
from so8t_train.config import FitConfig
from so8t_train.fit_plan import planned_device, planned_memory, surroundings
from so8t_train.memory_log import GIB
from so8t_train.memory_phases import Kind, MemoryPhases, read_phases, write_phases
from so8t_train.memory_plan import PhaseName
from so8t_train.model_shape import loaded_shape
from so8t_train.pass_sizes import fit_passes
from so8t_train.phase_peaks import PhasePeaks
from so8t_train.safety_model import SafetyModel
from so8t_train.training_data import TrainingExample

T = TypeVar("T")


class PhaseRecorder:
    """Measures and predicts the phases of a fit, made before it loads anything.

    Where it is not ``active``, in all processes but the main one, every call does nothing. No call
    stops a fit: what cannot be measured, predicted or written is told to ``news``.
    """

    def __init__(self, config: FitConfig, news: Callable[[str], None], *, active: bool) -> None:
        self._config, self._news = config, news
        self._directory: Path | None = None
        self._earlier: MemoryPhases | None = None
        self._predicted: dict[str, float] = {}
        self._around = self._tried(lambda: surroundings(config)) if active else None
        self._peaks = self._tried(lambda: PhasePeaks(_kind(config))) if active else None

    def ends(self, phase: PhaseName) -> None:
        """Book the peak since the last call under ``phase``, and write it once ``begin`` was."""
        peaks = self._peaks
        if peaks is not None:
            self._tried(lambda: peaks.ends(phase))
            self._tried(self._write)

    def predict(
        self, model: SafetyModel, source: BaseModelSource, examples: Sequence[TrainingExample]
    ) -> None:
        """Predict from what is loaded: the plan's figures without reading the files again."""
        around = self._around
        if around is None:
            return
        memory = self._tried(
            lambda: planned_memory(
                self._config,
                loaded_shape(source, model.base),
                examples,
                fit_passes(examples, self._config),
                around,
            )
        )
        if memory is not None:
            self._predicted = {phase.name: phase.total / GIB for phase in memory.phases}

    def begin(self, directory: Path, *, resumed: bool) -> None:
        """Write from now on; a ``resumed`` fit keeps the larger peaks of its earlier sessions."""
        self._directory = directory
        self._earlier = read_phases(directory) if resumed else None
        if self._peaks is not None:
            self._tried(self._write)

    @contextmanager
    def during(self, phase: PhaseName) -> Iterator[None]:
        """Book what is done inside under ``phase``, also when it fails or is interrupted."""
        try:
            yield
        finally:
            self.ends(phase)

    def _write(self) -> None:
        if self._directory is not None and self._peaks is not None:
            now = MemoryPhases(self._peaks.kind, self._predicted, self._peaks.measured)
            write_phases(self._directory, now.after(self._earlier))

    def _tried(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except Exception as error:  # whatever it is, training goes on
            self._news(f"warning: memory by phase is not recorded in full: {error}")
            return None


def _kind(config: FitConfig) -> Kind:
    return "cuda" if planned_device(config) == "cuda" else "rss"

"""``memory_phases.json``: the peak memory of a fit phase by phase, predicted and measured."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from so8t_eval.atomic_write import atomic_write_text

MEMORY_PHASES: Final = "memory_phases.json"
Kind = Literal["rss", "cuda"]
"""Resident memory of the process, or what the CUDA allocator reserved on all its devices."""


class MemoryPhases(NamedTuple):
    """GiB by phase; a phase that was not reached, or not predicted, is absent."""

    kind: Kind
    predicted: Mapping[str, float]
    measured: Mapping[str, float]

    def after(self, earlier: "MemoryPhases | None") -> "MemoryPhases":
        """Of this session and an ``earlier`` one: the larger peaks, this one's prediction.

        Peaks of another kind, from another device, are dropped: there is nothing to compare.
        """
        if earlier is None or earlier.kind != self.kind:
            return self
        phases = dict.fromkeys((*earlier.measured, *self.measured))
        measured = {
            phase: max(record.measured.get(phase, 0.0) for record in (earlier, self))
            for phase in phases
        }
        return self._replace(measured=measured, predicted=self.predicted or earlier.predicted)


def write_phases(directory: Path, phases: MemoryPhases) -> None:
    """Write ``memory_phases.json``.

    Raises:
        DiskError: it cannot be written.
    """
    text = json.dumps(phases._asdict(), indent=1)
    atomic_write_text(directory / MEMORY_PHASES, text + "\n")


def read_phases(directory: Path) -> MemoryPhases | None:
    """What a fit recorded; None if it recorded nothing that can be read."""
    try:
        record = json.loads((directory / MEMORY_PHASES).read_text(encoding="utf-8"))
        kind: Kind = "cuda" if record["kind"] == "cuda" else "rss"
        return MemoryPhases(kind, _peaks(record["predicted"]), _peaks(record["measured"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):  # none, or torn
        return None


def phases_table(record: MemoryPhases) -> str:
    """Markdown of a record."""
    rows = "\n".join(
        f"| {phase} | {_gib(record.predicted.get(phase))} | {_gib(record.measured.get(phase))} |"
        for phase in dict.fromkeys((*record.predicted, *record.measured))
    )
    return f"""Peak of every phase, as `so8t-train plan` predicts it and as measured:

| Phase | Predicted | Measured |
| --- | --- | --- |
{rows}"""


def _peaks(value: Any) -> dict[str, float]:
    return {str(phase): float(gib) for phase, gib in value.items()}


def _gib(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.2f} GiB"

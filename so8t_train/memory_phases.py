"""Peak memory of a fit phase by phase, as measured, beside what the plan predicted."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import psutil

from so8t_eval.atomic_write import atomic_write_text

MEMORY_PHASES: Final = "memory_phases.json"
_GIB: Final = float(1 << 30)
_STATUS: Final = Path("/proc/self/status")
_RESET: Final = Path("/proc/self/clear_refs")


class PhasePeaks:
    """Peak resident memory of this process between calls, GiB.

    On Linux the kernel's high-water mark, which it resets; elsewhere the size when a phase ends.
    """

    def __init__(self) -> None:
        self.measured: dict[str, float] = {}
        _reset()

    def ends(self, phase: str) -> None:
        """Book the peak since the last call under ``phase``; the larger one if it came before."""
        self.measured[phase] = max(self.measured.get(phase, 0.0), resident_peak() / _GIB)
        _reset()

    def save(self, directory: Path, predicted: Mapping[str, float]) -> None:
        """Write ``memory_phases.json`` with both, GiB by phase.

        Raises:
            DiskError: it cannot be written.
        """
        record = {"predicted": dict(predicted), "measured": self.measured}
        atomic_write_text(directory / MEMORY_PHASES, json.dumps(record, indent=1) + "\n")


def resident_peak() -> int:
    """Bytes that were resident at most since the last reset."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)


def _reset() -> None:
    try:
        _RESET.write_text("5", encoding="ascii")
    except OSError:  # not Linux, or not allowed: peaks then include earlier phases'
        return


def phases_table(record: Mapping[str, Mapping[str, float]]) -> str:
    """Markdown of a record that ``PhasePeaks.save`` wrote."""
    predicted, measured = record["predicted"], record["measured"]
    rows = "\n".join(
        f"| {phase} | {_gib(predicted.get(phase))} | {_gib(measured.get(phase))} |"
        for phase in dict.fromkeys((*predicted, *measured))
    )
    return f"""Peak of every phase, as `so8t-train plan` predicted it and as measured:

| Phase | Predicted | Measured |
| --- | --- | --- |
{rows}"""


def _gib(value: float | None) -> str:
    return "not recorded" if value is None else f"{value:.2f} GiB"

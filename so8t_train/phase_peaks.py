"""Peak memory between two moments: of this process on a CPU, of the allocator on CUDA."""

from pathlib import Path
from typing import Final

import psutil
import torch

from so8t_train.memory_log import GIB
from so8t_train.memory_phases import Kind

_STATUS: Final = Path("/proc/self/status")
_RESET: Final = Path("/proc/self/clear_refs")


class PhasePeaks:
    """Peak memory between calls, GiB: what the plan predicts for the kind of device.

    On CUDA that is what the allocator reserved, added over the devices of this process; it is reset
    for every phase, and what stays reserved from one phase to the next counts in both. Else it is
    the resident size: on Linux the kernel's high-water mark, which it resets, elsewhere the size at
    the moment of the call.
    """

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.measured: dict[str, float] = {}
        self._reset()

    def ends(self, phase: str) -> None:
        """Book the peak since the last call under ``phase``; the larger one if it came before."""
        peak = reserved_peak() if self.kind == "cuda" else resident_peak()
        self.measured[phase] = max(self.measured.get(phase, 0.0), peak / GIB)
        self._reset()

    def _reset(self) -> None:
        if self.kind == "cuda":
            for device in range(torch.cuda.device_count()):
                torch.cuda.reset_peak_memory_stats(device)
            return
        try:
            _RESET.write_text("5", encoding="ascii")
        except OSError:  # not Linux, or not allowed: peaks then include earlier phases'
            return


def reserved_peak() -> int:
    """Bytes that this process's CUDA allocator had reserved at most since the last reset."""
    return sum(torch.cuda.max_memory_reserved(i) for i in range(torch.cuda.device_count()))


def resident_peak() -> int:
    """Bytes that were resident at most since the last reset."""
    try:
        lines = _STATUS.read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        return int(psutil.Process().memory_info().rss)

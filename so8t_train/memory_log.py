"""Measured memory of every optimizer step, for ``memory.jsonl`` and the model card."""

from typing import Final, NamedTuple

import psutil
import torch

GIB: Final = float(1 << 30)


class MemoryUse(NamedTuple):
    """GiB now and at most so far; on CUDA the allocator's figures, else resident memory."""

    allocated_gib: float
    reserved_gib: float
    peak_gib: float
    kind: str


class MemoryLog:
    """Samples memory; keeps the peak, which platforms do not report or a phase's record resets."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._peak = 0

    def sample(self) -> MemoryUse:
        """Memory at this moment."""
        if self._device.type == "cuda":
            self._peak = max(self._peak, torch.cuda.max_memory_reserved(self._device))
            return MemoryUse(
                torch.cuda.memory_allocated(self._device) / GIB,
                torch.cuda.memory_reserved(self._device) / GIB,
                self._peak / GIB,
                "cuda",
            )
        rss = self._process.memory_info().rss
        self._peak = max(self._peak, rss)
        return MemoryUse(rss / GIB, rss / GIB, self._peak / GIB, "rss")

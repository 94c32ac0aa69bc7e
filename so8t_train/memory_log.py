"""Measured memory of every optimizer step, for ``memory.jsonl`` and the model card."""

from typing import NamedTuple

import psutil
import torch

GIB = float(1 << 30)


class MemoryUse(NamedTuple):
    """GiB now and at most so far; on CUDA the allocator's figures, else resident memory."""

    allocated_gib: float
    reserved_gib: float
    peak_gib: float
    kind: str


class MemoryLog:
    """Samples memory; keeps the peak resident size, which not every platform reports."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process = psutil.Process()
        self._peak_rss = 0

    def sample(self) -> MemoryUse:
        """Memory at this moment."""
        if self._device.type == "cuda":
            return MemoryUse(
                torch.cuda.memory_allocated(self._device) / GIB,
                torch.cuda.memory_reserved(self._device) / GIB,
                torch.cuda.max_memory_reserved(self._device) / GIB,
                "cuda",
            )
        rss = self._process.memory_info().rss
        self._peak_rss = max(self._peak_rss, rss)
        return MemoryUse(rss / GIB, rss / GIB, self._peak_rss / GIB, "rss")

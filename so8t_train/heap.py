"""glibc's heap while a model is loaded: what is freed goes back to the system, not into holes.

Loading frees as much as it keeps: float weights before they are quantized, casts. glibc maps a block
of its own only from a size that grows up to 32 MiB with use; smaller ones come from the heap,
where, once freed, they stay resident under whatever lives above them. A fixed low limit maps nearly
all tensors. It costs page faults at every allocation, which loading does not notice and training
would (a step took 1.4 times the processor time), so it ends with the loading.
"""

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

_M_TRIM_THRESHOLD: Final = -1
_M_MMAP_THRESHOLD: Final = -3
_LOADING: Final = 1 << 20
MAPPED_FROM: Final = 32 << 20
"""Bytes from which glibc maps a block of its own once it has adapted, its
DEFAULT_MMAP_THRESHOLD_MAX (mallopt(3)): larger blocks are given back when freed."""


@contextmanager
def freed_blocks_returned() -> Iterator[None]:
    """Give large blocks that are freed inside back to the system. Only with glibc, else nothing."""
    mallopt = _mallopt()
    if mallopt is None:
        yield
        return
    mallopt(_M_MMAP_THRESHOLD, _LOADING)
    try:
        yield
    finally:  # a limit once set adapts no more: what it would have adapted to
        mallopt(_M_MMAP_THRESHOLD, MAPPED_FROM)
        mallopt(_M_TRIM_THRESHOLD, 2 * MAPPED_FROM)


def _mallopt() -> Any:
    """The function of mallopt(3), or None where the C library has none."""
    return getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None

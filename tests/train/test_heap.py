"""What is freed while a model is loaded goes back to the system."""

import subprocess
import sys

import pytest

from so8t_train import heap
from so8t_train.heap import freed_blocks_returned

# Blocks of growing size, every other one freed: holes between what stays.
_PROGRAM = """
import contextlib, sys
import psutil, torch
from so8t_train.heap import freed_blocks_returned

context = freed_blocks_returned() if sys.argv[1] == "returned" else contextlib.nullcontext()
with context:
    large = torch.zeros(31 << 20, dtype=torch.uint8)
    del large  # glibc maps no block below this one's size now
    before = psutil.Process().memory_info().rss
    blocks = [torch.ones((4 << 20) + 4096 * i, dtype=torch.uint8) for i in range(40)]
    blocks = blocks[::2]
    print(psutil.Process().memory_info().rss - before, sum(b.numel() for b in blocks))
"""


def resident(mode: str) -> tuple[int, int]:
    """Bytes that became resident, and bytes in use, after half of the blocks are freed."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, mode], capture_output=True, text=True, check=True
    )
    added, used = map(int, done.stdout.split())
    return added, used


@pytest.mark.skipif(heap._mallopt() is None, reason="the C library is not glibc")
def test_freed_blocks_are_not_resident() -> None:
    added, used = resident("returned")
    assert added == pytest.approx(used, rel=0.1)
    kept, used = resident("kept")
    assert kept > 1.5 * used  # what the context is for


def test_another_c_library_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "win32")
    assert heap._mallopt() is None
    with freed_blocks_returned():
        pass

"""One process at a time in a directory; the system frees it when its holder dies."""

from pathlib import Path

import filelock

from so8t_eval.errors import So8tError


def held_lock(path: Path, busy: So8tError) -> filelock.BaseFileLock:
    """Make the directory of ``path`` if need be, and hold a lock there until it is released.

    Raises:
        So8tError: ``busy``, if another process holds it.
        OSError: it cannot be made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(path)
    try:
        lock.acquire(timeout=0)
    except filelock.Timeout:
        raise busy from None
    return lock

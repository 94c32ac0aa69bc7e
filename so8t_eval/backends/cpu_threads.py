"""How many CPU threads a model runtime should use."""

import os

import psutil


def default_threads() -> int:
    """Return the number of physical cores this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, min(usable, psutil.cpu_count(logical=False) or usable))

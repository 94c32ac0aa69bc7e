"""Where SO8T keeps what it can rebuild: the user's cache directory, or SO8T_CACHE_DIR."""

import os
from pathlib import Path
from typing import Final

import platformdirs

CACHE_VARIABLE: Final = "SO8T_CACHE_DIR"


def cache_directory() -> Path:
    """Return the cache directory, which may not exist yet."""
    chosen = os.environ.get(CACHE_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path(platformdirs.user_cache_dir("so8t", appauthor=False))

"""Ctrl-C and SIGTERM during training: first a request to stop at a whole step, then a stop."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def stop_signals(echo_s: float = 0.0) -> Iterator[Callable[[], bool]]:
    """Turn the first SIGINT or SIGTERM into a request to stop; a second one stops at once.

    Signals within ``echo_s`` seconds of the first are the same request: a launcher passes on to its
    processes what the terminal has sent them already.
    """
    requested: float | None = None

    def request(_number: int, _frame: FrameType | None) -> None:
        nonlocal requested
        if requested is None:
            requested = time.monotonic()
        elif time.monotonic() - requested >= echo_s:
            raise KeyboardInterrupt

    signals = (signal.SIGINT, signal.SIGTERM)
    try:
        before = {number: signal.signal(number, request) for number in signals}
    except ValueError:  # not the main thread: the caller handles signals
        yield lambda: False
        return
    try:
        yield lambda: requested is not None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

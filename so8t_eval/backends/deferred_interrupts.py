"""Hold Ctrl-C and SIGTERM back while C code may call Python, where an exception would be lost."""

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Final

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)


class DeferredInterrupts:
    """Context manager: a signal that arrives inside sets ``requested`` and takes effect on leaving.

    ctypes prints and drops an exception raised in a callback, KeyboardInterrupt included.
    """

    def __init__(self) -> None:
        self.requested: int | None = None
        self._previous: dict[int, Callable[[int, FrameType | None], object]] = {}

    def __enter__(self) -> "DeferredInterrupts":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                handler = signal.getsignal(number)
                if callable(handler):  # not ignored, nor left to the system
                    self._previous[number] = handler
                    signal.signal(number, self._note)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        if self.requested is not None:
            self._previous[self.requested](self.requested, None)

    def _note(self, number: int, _frame: FrameType | None) -> None:
        self.requested = number

"""Probes that end in every bad way, between ones that work."""

import os
import signal
import sys
import time

from so8t_train.doctor.finding import Answer, Probe


def _works() -> Answer:
    print("a library that prints to stdout")
    return Answer("ok", "works")


def _raises() -> Answer:
    raise ImportError("libmissing.so:\n cannot open")


def _crashes() -> Answer:
    signal.signal(signal.SIGABRT, signal.SIG_DFL)
    os.abort()


def _exits() -> Answer:
    print("the reason", file=sys.stderr)
    sys.stderr.flush()
    os._exit(7)


def _hangs() -> Answer:
    time.sleep(600)
    return Answer("ok", "never")


PROBES = (
    Probe("first", _works),
    Probe("raises", _raises, "repair it"),
    Probe("second", _works),
    Probe("crashes", _crashes, "rebuild it"),
    Probe("exits", _exits),
    Probe("third", _works),
    Probe("hangs", _hangs),
    Probe("last", _works),
)

"""Signals that arrive while C code runs take effect afterwards, and are never lost."""

import signal

import pytest

from so8t_eval.backends.deferred_interrupts import DeferredInterrupts


def test_interrupt_is_raised_on_leaving_and_handlers_are_restored() -> None:
    before = signal.getsignal(signal.SIGINT)
    reached: list[int | None] = []

    def interrupted_inside() -> None:
        with DeferredInterrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
            reached.append(interrupts.requested)

    with pytest.raises(KeyboardInterrupt):
        interrupted_inside()
    assert reached == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is before


def test_nothing_happens_without_a_signal() -> None:
    with DeferredInterrupts() as interrupts:
        pass
    assert interrupts.requested is None


def test_ignored_signal_stays_ignored() -> None:
    previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with DeferredInterrupts() as interrupts:
            signal.raise_signal(signal.SIGINT)
        assert interrupts.requested is None
    finally:
        signal.signal(signal.SIGINT, previous)

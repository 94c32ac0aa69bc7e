"""One probe's answer, and the rule that a failing probe is an answer too."""

from collections.abc import Callable
from typing import Literal, NamedTuple

Status = Literal["ok", "absent", "failed"]


class Finding(NamedTuple):
    """What a probe found. ``absent`` is a fact, not a fault; ``remedy`` would change it."""

    name: str
    status: Status
    value: str
    remedy: str = ""


class Answer(NamedTuple):
    """A probe function's result, before it gets its name."""

    status: Status
    value: str
    remedy: str = ""


class Probe(NamedTuple):
    """A named question; ``run`` may raise anything."""

    name: str
    run: Callable[[], Answer]
    remedy: str = ""
    """What to do when it raises."""


def run_probe(probe: Probe) -> Finding:
    """Ask one question; an exception becomes a failed finding with its text."""
    try:
        return Finding(probe.name, *probe.run())
    except Exception as error:  # whatever a broken installation raises is the finding
        reason = " ".join(str(error).split()) or "no reason given"
        return Finding(probe.name, "failed", f"{type(error).__name__}: {reason}", probe.remedy)

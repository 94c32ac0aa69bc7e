"""Run probes of native libraries in a child process: one that crashes hides only itself.

Run as ``python -m so8t_train.doctor.probe_process MODULE NAME…``, it answers in JSON lines.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Final, NamedTuple

from so8t_train.doctor.finding import Finding, Probe, run_probe

TIMEOUT_S: Final = 120.0
"""Enough for a machine busy with something else; a quiet one needs some seconds."""
_NOT_RUN: Final = "not run: an earlier probe took too long"


class _Attempt(NamedTuple):
    findings: list[Finding]
    reason: str
    """How the child ended, for the probe that got no answer."""
    timed_out: bool


def run_isolated(
    module: str, probes: Sequence[Probe], timeout_s: float = TIMEOUT_S
) -> list[Finding]:
    """Ask the probes of ``module.PROBES`` named in ``probes``, in order, one finding each.

    After a crash the remaining probes run in a fresh process. ``timeout_s`` bounds them all.
    """
    deadline = time.monotonic() + timeout_s
    findings: list[Finding] = []
    remaining = list(probes)
    while remaining:
        attempt = _attempt(module, remaining, max(0.1, deadline - time.monotonic()))
        findings += attempt.findings
        remaining = remaining[len(attempt.findings) :]
        if not remaining:
            break
        # A child that died before its first probe would die again: blame the first probe.
        findings.append(Finding(remaining[0].name, "failed", attempt.reason, remaining[0].remedy))
        remaining = remaining[1:]
        if attempt.timed_out:
            findings += [Finding(p.name, "failed", _NOT_RUN, p.remedy) for p in remaining]
            break
    return findings


def _attempt(module: str, probes: Sequence[Probe], timeout_s: float) -> _Attempt:
    names = [probe.name for probe in probes]
    command = [sys.executable, "-m", "so8t_train.doctor.probe_process", module, *names]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    timed_out = False
    try:
        output, errors = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        timed_out = True
    findings: list[Finding] = []
    for line in output.decode("utf-8").splitlines():
        with contextlib.suppress(ValueError):  # the line a dying child did not finish
            findings.append(Finding(*json.loads(line)))
    reason = _death(process, errors)
    if timed_out:
        reason = f"no answer within {timeout_s:.0f} s; if the machine is busy, try again"
    return _Attempt(findings, reason, timed_out)


def _death(process: "subprocess.Popen[bytes]", errors: bytes) -> str:
    code = process.returncode
    if code < 0:
        try:
            return f"crashed with {signal.Signals(-code).name}"
        except ValueError:
            return f"crashed with signal {-code}"
    lines = errors.decode("utf-8", "replace").strip().splitlines()
    return f"ended with code {code}: {lines[-1] if lines else 'no message'}"


def main(arguments: Sequence[str]) -> None:
    """Child side: run the named probes of a module, one answer a line."""
    module, *names = arguments
    # Libraries print to stdout as they please; the answers get a channel of their own.
    channel = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    probes: Sequence[Probe] = importlib.import_module(module).PROBES
    for probe in probes:
        if probe.name in names:
            print(json.dumps(run_probe(probe)), file=channel, flush=True)
    channel.close()


if __name__ == "__main__":
    main(sys.argv[1:])

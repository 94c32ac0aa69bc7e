"""Ask all probes and conclude: can this machine train, export, evaluate?"""

import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

from so8t_train.doctor import llamacpp_probes, machine_probes, package_probes, torch_probes
from so8t_train.doctor.finding import Finding, run_probe
from so8t_train.doctor.probe_process import run_isolated

_DISK: Final = "Disk, working directory"
_TRAIN: Final = ("Python", "Memory", _DISK, "PyTorch", "Training libraries")
_EXPORT: Final = (
    "Python",
    _DISK,
    "PyTorch",
    "Training libraries",
    "Package gguf",
    "llama.cpp decodes",
)
_EIGHT_BIT: Final = ("8-bit layers on cpu", "8-bit layers on cuda")
_FOUR_BIT: Final = ("4-bit layers on cpu", "4-bit layers on cuda")


class Verdict(NamedTuple):
    """Whether this machine can do a task, and what to know or change."""

    task: str
    possible: bool
    note: str


class Diagnosis(NamedTuple):
    """Everything ``so8t-train doctor`` shows."""

    findings: list[Finding]
    verdicts: list[Verdict]
    seconds: float

    @property
    def anything_works(self) -> bool:
        """Whether at least one task is possible."""
        return any(verdict.possible for verdict in self.verdicts)


def diagnose() -> Diagnosis:
    """Ask every probe; native libraries in child processes, side by side."""
    started = time.monotonic()
    with ThreadPoolExecutor(max_workers=2) as pool:
        isolated = [
            pool.submit(run_isolated, module.__name__, module.PROBES)
            for module in (torch_probes, llamacpp_probes)
        ]
        findings = [run_probe(probe) for probe in machine_probes.PROBES]
        packages = [run_probe(probe) for probe in package_probes.PROBES]
        for future in isolated:
            findings += future.result()
    findings += packages
    return Diagnosis(findings, conclude(findings), time.monotonic() - started)


def conclude(findings: Sequence[Finding]) -> list[Verdict]:
    """Return the verdicts on training, exporting and evaluating."""
    by_name = {finding.name: finding for finding in findings}
    return [_can_train(by_name), _can_export(by_name), _can_evaluate(by_name)]


def _can_train(findings: Mapping[str, Finding]) -> Verdict:
    problems = _problems(findings, _TRAIN)
    if problems:
        return Verdict("train", False, "; ".join(problems))
    notes = []
    if not any(_works(findings, name) for name in _EIGHT_BIT):
        notes.append("8-bit layers fail here: set load_in_8bit: false (more memory)")
    if not any(_works(findings, name) for name in _FOUR_BIT):
        notes.append("4-bit layers fail here: load_in_4bit cannot be set")
    base = findings.get("Embedded base")
    if base is not None and base.status != "ok":
        notes.append(f"for the reference configuration: {base.remedy}")
    return Verdict("train", True, "; ".join(notes))


def _can_export(findings: Mapping[str, Finding]) -> Verdict:
    problems = _problems(findings, _EXPORT)
    return Verdict("export", not problems, "; ".join(problems))


def _can_evaluate(findings: Mapping[str, Finding]) -> Verdict:
    llamacpp = _problems(findings, ("Python", "llama.cpp decodes"))
    torch = _problems(findings, ("Python", "PyTorch", "Training libraries"))
    if llamacpp and torch:
        return Verdict("evaluate", False, "; ".join(dict.fromkeys(llamacpp + torch)))
    if llamacpp:
        return Verdict("evaluate", True, "torch: models only; " + "; ".join(llamacpp))
    if torch:
        return Verdict("evaluate", True, "llamacpp: models only; " + "; ".join(torch))
    return Verdict("evaluate", True, "")


def _problems(findings: Mapping[str, Finding], needed: Iterable[str]) -> list[str]:
    problems = []
    for name in needed:
        finding = findings.get(name)
        if finding is None:
            problems.append(f"{name}: not probed")
        elif finding.status != "ok":
            remedy = f" ({finding.remedy})" if finding.remedy else ""
            problems.append(f"{name}: {finding.value}{remedy}")
    return problems


def _works(findings: Mapping[str, Finding], name: str) -> bool:
    return name in findings and findings[name].status == "ok"

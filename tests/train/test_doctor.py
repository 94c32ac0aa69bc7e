"""The doctor really runs what it reports, and no broken probe hides another."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from support import broken_probes

from so8t_train.cli import main
from so8t_train.doctor import llamacpp_probes, machine_probes, package_probes, torch_probes
from so8t_train.doctor.diagnosis import conclude
from so8t_train.doctor.finding import Answer, Finding, Probe, run_probe
from so8t_train.doctor.machine_probes import parse_cpuinfo
from so8t_train.doctor.probe_process import run_isolated

TESTS = Path(__file__).parents[1]
ALL_PROBES = (
    *machine_probes.PROBES,
    *torch_probes.PROBES,
    *llamacpp_probes.PROBES,
    *package_probes.PROBES,
)
X86_CPUINFO = """processor\t: 0
model name\t: Some Server CPU
flags\t\t: fpu sse avx2 avx512f avx512_bf16 amx_bf16
"""
ARM_CPUINFO = """processor\t: 0
Features\t: fp asimd bf16
"""


def healthy() -> list[Finding]:
    return [Finding(probe.name, "ok", "fine") for probe in ALL_PROBES]


def with_failures(*names: str) -> list[Finding]:
    assert set(names) <= {probe.name for probe in ALL_PROBES}
    return [
        Finding(name, "failed", "broke", f"repair {name}") if name in names else finding
        for finding in healthy()
        for name in [finding.name]
    ]


@pytest.fixture
def children_import_tests(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(TESTS), str(TESTS.parent)]))


@pytest.mark.usefixtures("children_import_tests")
def test_a_raising_or_crashing_probe_hides_no_other() -> None:
    probes = broken_probes.PROBES[:6]
    findings = run_isolated("support.broken_probes", probes)
    assert [finding.name for finding in findings] == [probe.name for probe in probes]
    by_name = {finding.name: finding for finding in findings}
    assert [by_name[name].value for name in ("first", "second", "third")] == ["works"] * 3
    raises, crashes, exits = (by_name[name] for name in ("raises", "crashes", "exits"))
    assert raises == Finding(
        "raises", "failed", "ImportError: libmissing.so: cannot open", "repair it"
    )
    assert crashes.status == "failed"
    assert crashes.remedy == "rebuild it"
    assert exits.value == "ended with code 7: the reason"
    if os.name == "posix":
        assert crashes.value == "crashed with SIGABRT"


@pytest.mark.usefixtures("children_import_tests")
def test_a_hanging_probe_is_stopped() -> None:
    probes = broken_probes.PROBES[5:]
    findings = run_isolated("support.broken_probes", probes, timeout_s=5)
    assert [finding.status for finding in findings] == ["ok", "failed", "failed"]
    assert "no answer within" in findings[1].value
    assert "not run" in findings[2].value


def test_a_module_that_cannot_be_imported_fails_each_probe() -> None:
    probes = (Probe("one", lambda: Answer("ok", "")), Probe("two", lambda: Answer("ok", "")))
    findings = run_isolated("so8t_train.no_such_module", probes)
    assert [finding.status for finding in findings] == ["failed", "failed"]
    assert "no_such_module" in findings[0].value


def test_llamacpp_decodes_a_real_model() -> None:
    findings = run_isolated(llamacpp_probes.__name__, llamacpp_probes.PROBES)
    assert [finding.status for finding in findings] == ["ok", "ok"], findings
    assert findings[0].value.startswith("llama-cpp-python")


def test_a_broken_bitsandbytes_leaves_the_other_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "bitsandbytes.py").write_text("raise OSError('no libcuda')", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path), str(TESTS.parent)]))
    probes = [p for p in torch_probes.PROBES if p.name != "Training libraries"]
    findings = {f.name: f for f in run_isolated(torch_probes.__name__, probes)}
    assert findings["PyTorch"].status == "ok"
    assert findings["bfloat16 on cpu"].status == "ok"
    broken = findings["8-bit layers on cpu"]
    assert (broken.status, broken.value) == ("failed", "OSError: no libcuda")
    assert "load_in_8bit: false" in broken.remedy


@pytest.mark.slow
def test_doctor_reports_this_machine_as_json() -> None:
    command = [sys.executable, "-m", "so8t_train.cli", "doctor", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    report = json.loads(done.stdout)
    assert {f["name"] for f in report["findings"]} == {probe.name for probe in ALL_PROBES}
    status = {f["name"]: f["status"] for f in report["findings"]}
    for name in ("PyTorch", "8-bit layers on cpu", "Training libraries", "llama.cpp decodes"):
        assert status[name] == "ok", report
    assert status["Embedded base"] == "ok"
    assert [v["task"] for v in report["verdicts"]] == ["train", "export", "evaluate"]
    assert all(v["possible"] for v in report["verdicts"]), report


def test_a_table_and_three_verdict_lines_are_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    from so8t_train.doctor import diagnosis

    findings = with_failures("llama.cpp decodes")
    shown = diagnosis.Diagnosis(findings, conclude(findings), 1.0)
    monkeypatch.setattr(diagnosis, "diagnose", lambda: shown)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == 0
    lines = result.output.replace("\n", " ")
    assert "can train: yes" in lines
    assert "can export: no - llama.cpp decodes: broke (repair llama.cpp decodes)" in lines
    assert "can evaluate: yes - torch: models only" in lines


def test_exit_code_is_3_only_when_nothing_works(monkeypatch: pytest.MonkeyPatch) -> None:
    from so8t_train.doctor import diagnosis

    findings = with_failures("PyTorch", "llama.cpp decodes")
    shown = diagnosis.Diagnosis(findings, conclude(findings), 1.0)
    monkeypatch.setattr(diagnosis, "diagnose", lambda: shown)
    result = CliRunner().invoke(main, ["doctor", "--json"])
    assert result.exit_code == 3
    assert not any(v["possible"] for v in json.loads(result.output)["verdicts"])


@pytest.mark.parametrize(
    ("broken", "train", "export", "evaluate"),
    [
        ((), True, True, True),
        (("llama.cpp decodes",), True, False, True),
        (("PyTorch",), False, False, True),
        (("Training libraries",), False, False, True),
        (("Package gguf",), True, False, True),
        (("Disk, working directory",), False, False, True),
        (("8-bit layers on cpu", "8-bit layers on cuda"), True, True, True),
        (("PyTorch", "llama.cpp decodes"), False, False, False),
    ],
)
def test_verdicts_follow_from_what_each_task_needs(
    broken: tuple[str, ...], train: bool, export: bool, evaluate: bool
) -> None:
    verdicts = conclude(with_failures(*broken))
    assert [verdict.possible for verdict in verdicts] == [train, export, evaluate]
    for verdict in verdicts:
        if not verdict.possible:
            assert "repair" in verdict.note


def test_training_without_8_bit_says_what_to_set() -> None:
    findings = with_failures("8-bit layers on cpu", "8-bit layers on cuda", "Embedded base")
    train = conclude(findings)[0]
    assert train.possible
    assert "load_in_8bit: false" in train.note
    assert "repair Embedded base" in train.note


def test_an_exception_becomes_a_finding() -> None:
    def broken() -> Answer:
        raise RuntimeError

    assert run_probe(Probe("x", broken, "fix")) == Finding(
        "x", "failed", "RuntimeError: no reason given", "fix"
    )


def test_processor_features_are_read_on_both_architectures() -> None:
    assert parse_cpuinfo(X86_CPUINFO) == (
        "Some Server CPU",
        ["AVX2", "AVX512", "AVX512_BF16", "AMX_BF16"],
    )
    assert parse_cpuinfo(ARM_CPUINFO)[1] == ["NEON", "ARM_BF16"]
    assert parse_cpuinfo("")[1] == []

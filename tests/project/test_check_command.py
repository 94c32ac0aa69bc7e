"""One command checks everything, and CI runs exactly that."""

import importlib.util
import os
import stat
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def check() -> ModuleType:
    spec = importlib.util.spec_from_file_location("check", ROOT / "scripts" / "check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_format_lint_contracts_types_gate_and_tests(check: ModuleType) -> None:
    commands = check.steps(["-q"])
    text = {name: " ".join(command[1:]) or command[0] for name, command in commands.items()}
    assert text["format"] == "-m ruff format --check"
    assert text["lint"] == "-m ruff check"
    assert text["import contracts"].endswith("lint-imports")
    assert text["types"] == "-m mypy"
    assert text["reference model's CI gate"].endswith("gate_reference.py")
    assert text["tests"] == "-m pytest -q"


def test_one_failing_step_fails_the_check_and_hides_no_other(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    import sys

    def steps(_arguments: list[str]) -> dict[str, list[str]]:
        return {
            "bad": [sys.executable, "-c", "raise SystemExit(5)"],
            "good": [sys.executable, "-c", "print('ran')"],
        }

    monkeypatch.setattr(check, "steps", steps)
    assert check.main([]) == 1
    output = capfd.readouterr().out
    assert "exit code 5" in output
    assert "ran" in output
    assert "failed: bad" in output


def test_ci_runs_the_command_that_contributors_run() -> None:
    script = ROOT / ".ci" / "run"
    text = script.read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert "python scripts/check.py" in text
    assert '--constraint constraints.txt ".[reference,test]"' in text
    assert "python scripts/check.py" in (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    if os.name == "posix":
        assert script.stat().st_mode & stat.S_IXUSR


def test_what_ci_leaves_behind_is_ignored_by_git() -> None:
    assert ".venv-ci/" in (ROOT / ".gitignore").read_text(encoding="utf-8").splitlines()

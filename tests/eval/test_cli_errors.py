"""Exit codes: every kind of failure maps to its own, and 1 is never among them."""

import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from so8t_eval.cli import COMMANDS, main
from so8t_eval.cli_errors import So8tGroup, set_resume_command
from so8t_eval.errors import BackendError, CaseFileError, UsageError

HEAVY = ("torch", "transformers", "llama_cpp", "numpy", "sklearn", "scipy", "pydantic", "rich")


@click.group(cls=So8tGroup)
def group() -> None:
    """Commands that end in every way."""


@group.command()
@click.argument("kind")
def fail(kind: str) -> int:
    set_resume_command("resume me")
    failures: dict[str, BaseException] = {
        "usage": UsageError("wrong"),
        "case": CaseFileError("f.jsonl", 3, "id", "bad"),
        "backend": BackendError("broke"),
        "bug": ZeroDivisionError("by\nzero"),
        "click": click.ClickException("clicked"),
        "interrupt": KeyboardInterrupt(),
        "abort": click.Abort(),
        "pipe": BrokenPipeError(),
        "memory": MemoryError(),
        "exit4": click.exceptions.Exit(4),
    }
    if kind in failures:
        raise failures[kind]
    return int(kind)


@pytest.mark.parametrize(
    ("kind", "code", "text"),
    [
        ("usage", 2, "wrong"),
        ("case", 2, "f.jsonl:3: id: bad"),
        ("backend", 3, "broke"),
        ("bug", 3, "unexpected ZeroDivisionError: by zero (set SO8T_DEBUG=1 for a traceback)"),
        ("click", 2, "clicked"),
        ("interrupt", 130, "resume me"),
        ("abort", 130, "interrupted"),
        ("memory", 3, "MemoryError"),
        ("exit4", 4, ""),
        ("0", 0, ""),
        ("1", 1, ""),
        ("4", 4, ""),
    ],
)
def test_exit_code_and_message(kind: str, code: int, text: str) -> None:
    result = CliRunner().invoke(group, ["fail", kind])
    assert result.exit_code == code
    assert text in result.stderr
    assert "Traceback" not in result.stderr
    assert result.stdout == ""


def test_closed_output_is_quiet_and_not_a_pass() -> None:
    result = CliRunner().invoke(group, ["fail", "pipe"])
    assert result.exit_code == 3
    assert result.stderr == ""


def test_debug_variable_shows_the_traceback() -> None:
    result = CliRunner().invoke(group, ["fail", "bug"], env={"SO8T_DEBUG": "1"})
    assert result.exit_code == 3
    assert "Traceback" in result.stderr


@pytest.mark.parametrize("arguments", [["nothing"], ["fail"], ["--wrong"]])
def test_click_usage_errors_are_2(arguments: list[str]) -> None:
    assert CliRunner().invoke(group, arguments).exit_code == 2


@pytest.mark.parametrize("arguments", [["--help"], ["--version"]])
def test_help_imports_no_heavy_module(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom so8t_eval.cli import main\n"
        f"try:\n    main({arguments!r}, prog_name='so8t-eval')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        f"print('LOADED', sorted(set({HEAVY!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_command_help_loads_no_runtime_and_agrees_with_the_list(name: str) -> None:
    code = (
        "import sys\nfrom so8t_eval.cli import main\n"
        f"try:\n    main([{name!r}, '--help'], prog_name='so8t-eval')\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        f"print('LOADED', sorted(set({HEAVY[:3]!r}) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "LOADED []" in done.stdout
    command = main.get_command(click.Context(main), name)
    assert command is not None
    assert command.get_short_help_str(200) == COMMANDS[name].short_help


def test_reader_that_closes_the_pipe_leaves_no_traceback(tiny_gguf: Path) -> None:
    arguments = [sys.executable, "-m", "so8t_eval.cli", "judge", "hello", "--model"]
    process = subprocess.Popen(
        [*arguments, f"llamacpp:{tiny_gguf}"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=30) == 3
    assert process.stderr.read() == b""
    process.stderr.close()

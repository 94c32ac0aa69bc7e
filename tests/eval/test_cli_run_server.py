"""``so8t-eval run`` with a server: files, undefined figures, options, exit codes, interruption."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.case_files import case_dict, write_cases
from support.chat_server import ChatServer, Fault, TinyModel, chat_server, says
from support.speaking_gguf import write_speaking_gguf

from so8t_eval.cli import main
from so8t_eval.records import read_records

SPEC = Path(__file__).parents[2] / "docs" / "guard-specs" / "llama-guard-3.toml"


def invoke(*arguments: str | Path, command: str = "run") -> Result:
    return CliRunner().invoke(main, [command, *map(str, arguments)], prog_name="so8t-eval")


@pytest.fixture
def case_file(tmp_path: Path) -> Path:
    return write_cases(tmp_path / "cases.jsonl", [case_dict(i) for i in range(9)])


@pytest.fixture(scope="module")
def speaking_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_speaking_gguf(tmp_path_factory.mktemp("speaking") / "speaking.gguf")


@pytest.fixture(scope="module")
def server(speaking_gguf: Path) -> Iterator[ChatServer]:
    model = TinyModel(speaking_gguf)
    with chat_server(model) as running:
        yield running
    model.close()


def test_a_file_and_a_server_in_one_run_agree(
    server: ChatServer, speaking_gguf: Path, case_file: Path, tmp_path: Path
) -> None:
    log_dir = tmp_path / "log"
    result = invoke(
        case_file, "--model", f"llamacpp:{speaking_gguf}", "--model", f"openai:{server.url}#tiny",
        "--latency-cases", "3", "--threads", "1", "--log-dir", log_dir,
    )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    summary = json.loads((log_dir / "summary.json").read_text())
    assert [run["backend"] for run in summary["runs"]] == ["llamacpp", "openai"]
    assert summary["comparison"]["agreement"]["value"] == 1.0
    assert summary["comparison"]["max_probability_difference"] < 0.01
    assert summary["comparison"]["same_protocol"] is False
    assert summary["versions"]["openai"] == "tiny-server/1.0"
    settings = summary["runs"][1]["settings"]
    assert settings == {
        "url": server.url,
        "verdict_mode": "logprobs",
        "concurrency": 4,
        "request_timeout_s": 120.0,
        "window_cases": 1000,
    }
    assert "one request alone" in (log_dir / "report.md").read_text()
    server.asked.clear()
    again = invoke(
        case_file, "--model", f"llamacpp:{speaking_gguf}", "--model", f"openai:{server.url}/#tiny",
        "--latency-cases", "0", "--concurrency", "2", "--log-dir", log_dir, "--resume",
    )  # fmt: skip
    assert again.exit_code == 0, again.stderr
    assert server.asked == []


def test_without_probabilities_what_needs_them_is_undefined_everywhere(
    case_file: Path, tmp_path: Path
) -> None:
    log_dir = tmp_path / "log"
    with chat_server(says("unsafe\nS6")) as server:
        result = invoke(
            case_file, "--model", f"openai:{server.url}#guard", "--guard-spec", SPEC,
            "--log-dir", log_dir,
        )  # fmt: skip
    assert result.exit_code == 0, result.stderr
    (run,) = json.loads((log_dir / "summary.json").read_text())["runs"]
    assert run["metrics"]["ece"] == {"value": None, "low": None, "high": None, "n": 0}
    assert run["metrics"]["escalate_precision"]["n"] == 9
    assert run["latency_ms"]["p50"] > 0
    assert run["settings"]["guard_spec"] == "Llama Guard 3"
    assert "undefined (n=0)" in result.stdout
    assert "| ECE | undefined (n=0) |" in (log_dir / "report.md").read_text()
    compared = invoke(log_dir, log_dir, "--json", command="compare")
    assert compared.exit_code == 0, compared.stderr
    assert json.loads(compared.stdout)["metrics"]["ece"]["difference"] is None
    policy = tmp_path / "policy.toml"
    policy.write_text('[[bounds]]\nmetric = "ece"\nmax = 0.5\n', encoding="utf-8")
    gated = invoke(log_dir, "--policy", policy, command="gate")
    assert gated.exit_code == 4, gated.stdout + gated.stderr  # cannot tell, which is no pass


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--model", "openai:http://h:1/v1"], "expected openai:URL#MODEL"),
        (["--model", "openai:h:1/v1#m"], "expected openai:URL#MODEL"),
        (["--model", "openai:ftp://h/v1#m"], "expected openai:URL#MODEL"),
        (["--model", "openai:http://h:x/v1#m"], "expected openai:URL#MODEL"),
        (["--model", "openai:http://me:secret@h/v1#m"], "without user name and password"),
        (["--model", "onnx:x"], "or openai:URL#MODEL, found 'onnx:x'"),
        (["--guard-spec", "x.toml"], "--guard-spec is for servers"),
        (["--verdict-mode", "text"], "--verdict-mode is for servers"),
        (["--model", "openai:http://h/v1#m", "--verdict-mode", "guard"], "--guard-spec FILE"),
        (
            ["--model", "openai:http://h/v1#m", "--verdict-mode", "text", "--guard-spec", "x.toml"],
            "--guard-spec needs --verdict-mode guard, found text",
        ),
        (["--model", "openai:http://h/v1#m", "--guard-spec", "none.toml"], "none.toml: cannot be"),
        (["--model", "openai:http://h/v1#m", "--request-timeout", "0"], "--request-timeout"),
    ],
)
def test_wrong_arguments_are_2(case_file: Path, arguments: list[str], problem: str) -> None:
    result = invoke(case_file, *arguments)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert "secret" not in result.stderr


@pytest.mark.parametrize(
    "option", [["--operating-point", "strict"], ["--deterministic"]], ids=lambda o: o[0]
)
def test_what_a_server_cannot_follow_is_refused_not_ignored(
    case_file: Path, option: list[str]
) -> None:
    result = invoke(case_file, "--model", "openai:http://h/v1#m", *option)
    assert result.exit_code == 2
    assert f"{' '.join(option)}: a model behind a server" in result.stderr


def test_other_commands_say_that_they_need_the_model_itself() -> None:
    result = invoke("hello", "--model", "openai:http://h/v1#m", command="judge")
    assert result.exit_code == 2
    assert "only so8t-eval run can ask a server" in result.stderr


@pytest.mark.parametrize("kind", ["nobody", "locked"])
def test_a_server_that_cannot_be_used_is_3_before_anything_is_written(
    case_file: Path, tmp_path: Path, kind: str
) -> None:
    with chat_server(says("allow")) as server:
        server.models_fault = Fault(401)
        url = server.url if kind == "locked" else "http://127.0.0.1:9/v1"
        result = invoke(case_file, "--model", f"openai:{url}#m", "--log-dir", tmp_path / "log")
    assert result.exit_code == 3
    expected = "SO8T_OPENAI_API_KEY is not set" if kind == "locked" else "start the server"
    assert expected in result.stderr
    assert not (tmp_path / "log").exists()


def test_an_interrupted_run_ends_at_once_and_keeps_what_it_has(
    server: ChatServer, tmp_path: Path
) -> None:
    path = write_cases(tmp_path / "cases.jsonl", [case_dict(i) for i in range(30)])
    records_path = tmp_path / "log" / "records.jsonl"
    server.faults.extend([Fault()] * 6 + [Fault(delay_s=25.0)] * 4)
    process = subprocess.Popen(
        [sys.executable, "-m", "so8t_eval.cli", "run", str(path), "--log-dir",
         str(tmp_path / "log"), "--model", f"openai:{server.url}#tiny", "--latency-cases", "0"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not (records_path.exists() and records_path.read_bytes().count(b"\n") >= 6):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    interrupted = time.monotonic()
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert time.monotonic() - interrupted < 15
    assert "--resume" in stderr
    assert "Traceback" not in stderr
    assert len(read_records(records_path).records) == 6
    server.faults.clear()

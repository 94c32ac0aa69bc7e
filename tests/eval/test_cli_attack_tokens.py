"""``so8t-eval attack-tokens``: exit codes, output, file and messages."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.real_vocabulary import make_user_defined
from support.tiny_gguf import vocabulary, write_tiny_gguf

from so8t_eval.attack_report import AttackReport
from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.cli import main


def invoke(*arguments: str | Path) -> Result:
    command = ["attack-tokens", *map(str, arguments)]
    return CliRunner().invoke(main, command, prog_name="so8t-eval")


@pytest.fixture
def model(tiny_gguf: Path) -> str:
    return f"llamacpp:{tiny_gguf}"


def test_safe_model_passes_and_the_file_holds_every_figure(model: str, tmp_path: Path) -> None:
    path = tmp_path / "attack.json"
    result = invoke("--model", model, "--limit", 300, "--compare", 20, "--json", path)
    assert result.exit_code == 0, result.output
    assert "passed: no control id was forged" in result.stdout
    assert "0 of 2" in result.stdout
    report = AttackReport.model_validate_json(path.read_text(encoding="utf-8"))
    (run,) = report.runs
    assert (report.limit, run.attempts, run.compared, run.control_tokens) == (300, 300, 20, 5)
    assert run.ids_forged == 0
    assert run.settings["threads"]


def test_equal_seeds_give_equal_files(model: str, tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        path = tmp_path / name
        arguments = ("--limit", 100, "--compare", 10, "--seed", seed, "--threads", 1)
        assert invoke("--model", model, *arguments, "--json", path).exit_code == 0
        files.append(path.read_bytes())
    assert files[0] == files[1] != files[2]


def test_forged_ids_are_1(tiny_gguf: Path, tmp_path: Path) -> None:
    start = vocabulary().index("<|im_start|>")
    unsafe = make_user_defined(tiny_gguf, tmp_path / "unsafe.gguf", start)
    path = tmp_path / "attack.json"
    result = invoke("--model", f"llamacpp:{unsafe}", "--limit", 800, "--compare", 0, "--json", path)
    assert result.exit_code == 1
    assert "Control ids forged: " in result.stdout
    assert "<|im_start|>  plain, " in result.stdout
    run = json.loads(path.read_text(encoding="utf-8"))["runs"][0]
    assert f"FAILED  llamacpp unsafe.gguf: {run['ids_forged']} control ids were" in result.stdout
    assert run["forging_attempts"]["low"] > 0
    assert {name for forgery in run["forgeries"] for name in forgery["tokens"]} == {"<|im_start|>"}


def test_special_tokens_parsed_in_user_text_are_1(
    model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    safe = LlamaCppBackend.tokenize
    monkeypatch.setattr(
        LlamaCppBackend, "tokenize", lambda self, text, _parse_special: safe(self, text, True)
    )
    result = invoke("--model", model, "--limit", 200, "--compare", 0)
    assert result.exit_code == 1
    assert "FAILED" in result.stdout


def test_verdict_changes_fail_only_beyond_the_number_allowed(tmp_path: Path) -> None:
    model = f"llamacpp:{write_tiny_gguf(tmp_path / 'm.gguf', seed=1)}"
    arguments = ("--model", model, "--limit", 300, "--compare", 60, "--threads", 1)
    path = tmp_path / "attack.json"
    assert invoke(*arguments, "--json", path).exit_code == 0
    n = AttackReport.model_validate_json(path.read_text(encoding="utf-8")).runs[0].n_less_severe
    assert n > 0
    assert invoke(*arguments, "--max-verdict-changes", n).exit_code == 0
    result = invoke(*arguments, "--max-verdict-changes", n - 1)
    assert result.exit_code == 1
    assert f"{n} verdicts became less severe, at most {n - 1} allowed" in result.stdout


def test_wrong_arguments_are_2(model: str, tmp_path: Path) -> None:
    for arguments, problem in (
        (["--model", "onnx:x"], "llamacpp:FILE.gguf"),
        (["--model", model, "--model", model], "is given twice"),
        (["--model", model, "--limit", "0"], "--limit"),
        (["--model", model, "--json", str(tmp_path)], "expected a file, found a directory"),
        (
            ["--model", model, "--compare", "0", "--max-verdict-changes", "0"],
            "no verdict is compared",
        ),
    ):
        result = invoke(*arguments)
        assert result.exit_code == 2
        assert problem in result.stderr


def test_missing_model_is_3_and_leaves_no_file(tmp_path: Path) -> None:
    path = tmp_path / "attack.json"
    result = invoke("--model", f"llamacpp:{tmp_path / 'none.gguf'}", "--json", path)
    assert result.exit_code == 3
    assert "no such file" in result.stderr
    assert not path.exists()


def test_a_file_that_cannot_be_written_is_found_before_a_model_is_opened(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "attack.json"
    result = invoke("--model", f"llamacpp:{tmp_path / 'none.gguf'}", "--json", path)
    assert result.exit_code == 3
    assert f"cannot write {path}: Not a directory" in result.stderr

"""``so8t-train data`` as a command: help, output, JSON, exit codes."""

import json
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner, Result
from support.case_files import case_dict, write_cases
from support.related_cases import single_cases

from so8t_train.base_model import EMBEDDED
from so8t_train.cli import main
from so8t_train.cli.data import COMMANDS, data
from so8t_train.cli.data_options import EMBEDDED as DEFAULT_BASE
from so8t_train.cli.data_options import MAX_LENGTH, MAX_SEED
from so8t_train.config import MAX_SEED as CONFIG_MAX_SEED
from so8t_train.config import FitConfig


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["data", *map(str, arguments)], prog_name="so8t-train")


@pytest.fixture
def file(tmp_path: Path) -> Path:
    cases = [case.model_dump(mode="json", exclude_none=True) for case in single_cases(30)]
    cases[0]["reply"] = "Sure."
    return write_cases(tmp_path / "all.jsonl", cases)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_list_shows_each_commands_own_help_line(name: str) -> None:
    command = data.get_command(click.Context(data), name)
    assert command is not None
    assert command.get_short_help_str(200) == COMMANDS[name].short_help


def test_defaults_are_those_of_a_configuration() -> None:
    assert DEFAULT_BASE == EMBEDDED
    assert FitConfig.model_fields["max_length"].default == MAX_LENGTH
    assert MAX_SEED == CONFIG_MAX_SEED


def test_check_shows_figures_and_ends_with_0(file: Path, tiny_llama: Path) -> None:
    result = invoke("check", file, "--base-model", tiny_llama)
    assert result.exit_code == 0, result.output
    for text in ("all.jsonl: 30 cases", "33.3%", "10.0%", "en longest pass", ": 0 left out"):
        assert text in result.stdout
    assert result.stdout.splitlines()[-1] == "0 errors, 2 warnings"


def test_check_ends_with_2_on_errors(file: Path, tiny_llama: Path, tmp_path: Path) -> None:
    dev = write_cases(tmp_path / "dev.jsonl", [case_dict(0, prompt=single_cases(6)[5].text)])
    arguments = ("check", file, "--against", dev, "--base-model", tiny_llama)
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert f"{file}:6: error [near-duplicate] single-5: 1.00 similar to {dev}:1" in result.stdout
    facts = json.loads(invoke(*arguments, "--json").stdout)
    assert (facts["errors"], facts["warnings"], facts["max_length"]) == (1, 2, 1024)
    assert facts["files"][0]["cases"]["refuse/en"] == 5
    assert [f["id"] for f in facts["findings"] if f["severity"] == "error"] == ["single-5"]


def test_split_tells_shares(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = invoke("split", file, "-o", out, "--dev", "0.2", "--seed", "3")
    assert result.exit_code == 0, result.output
    for text in ("20.0%", "30 groups", f"{out / 'dev.jsonl'}: 6 cases", "every case once"):
        assert text in result.stdout
    again = invoke("split", file, "-o", out)
    assert again.exit_code == 2
    assert "exists; add --force" in again.stderr
    facts = json.loads(invoke("split", file, "-o", out, "--force", "--json").stdout)
    assert (facts["n_dev"], facts["dev_share"]) == (3, 0.1)
    assert facts["strata"]["allow/en"]["cases"] == 5


def test_balance_tells_what_is_left_out(file: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.jsonl"
    result = invoke("balance", file, "-o", out, "--to", 4)
    assert result.exit_code == 0, result.output
    assert f"{out}: 12 of 30 cases, 4 of each verdict" in result.stdout
    assert "and 13 more (--json lists all)" in result.stdout
    facts = json.loads(invoke("balance", file, "-o", out, "--to", 4, "--force", "--json").stdout)
    assert len(facts["left_out"]) == 18
    assert facts["strata"]["refuse/ja"]["left_out"] == 3


def test_preview_marks_the_verdict_position(file: Path, tiny_llama: Path) -> None:
    result = invoke("preview", file, "--base-model", tiny_llama)
    assert result.exit_code == 0, result.output
    (line,) = [line for line in result.stdout.splitlines() if "│ >" in line]
    for text in ("tail", "template", "verdict", "<|so8t_allow|>"):
        assert text in line
    assert "then 4 with verdict and reply" in result.stdout
    arguments = (
        "preview",
        file,
        "--base-model",
        tiny_llama,
        "--id",
        "single-2",
        "--id",
        "single-4",
    )
    facts = json.loads(invoke(*arguments, "--json").stdout)
    assert [case["id"] for case in facts["cases"]] == ["single-2", "single-4"]
    token = facts["cases"][0]["tokens"][facts["cases"][0]["verdict_position"]]
    assert (token["loss"], token["target_piece"]) == ("verdict", "<|so8t_refuse|>")
    limited = invoke("preview", file, "--base-model", tiny_llama, "--limit", "3", "--json")
    assert len(json.loads(limited.stdout)["cases"]) == 3


def test_every_part_of_a_preview_has_a_colour_in_a_terminal(
    file: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    coloured = invoke("preview", file, "--base-model", tiny_llama).stdout
    styles = dict(re.findall(r"\x1b\[([\d;]+)m *(head|body|tail|verdict|reply) *\x1b", coloured))
    assert set(styles.values()) == {"head", "body", "tail", "verdict", "reply"}


def test_preview_warns_of_a_case_that_training_leaves_out(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_cases(tmp_path / "a.jsonl", [case_dict(0, prompt="long " * 60)])
    result = invoke("preview", path, "--base-model", tiny_llama, "--max-length", "64")
    assert "max_length of 64; training leaves this case out" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "code", "text"),
    [
        (["check"], 2, "FILE"),
        (["check", "{file}", "{file}", "--base-model", "{base}"], 2, "given twice"),
        (["check", "{file}", "--base-model", "nothing"], 2, "is no file, directory or hub id"),
        (["check", "{file}", "--base-model", "{dir}"], 3, "not a model directory"),
        (["split", "{file}"], 2, "--output-dir"),
        (["split", "{file}", "-o", "{dir}", "--dev", "1"], 2, "--dev"),
        (["split", "{dir}/none.jsonl", "-o", "{dir}"], 2, "no such file"),
        (["split", "{file}", "-o", "{file}"], 2, "expected a directory, found a file"),
        (["balance", "{file}", "-o", "{dir}/b.jsonl", "--to", "0"], 2, "--to"),
        (["balance", "{file}", "-o", "{dir}/b.jsonl", "--to", "99"], 2, "smallest class has 10"),
        (["balance", "{file}", "-o", "{file}", "--force"], 2, "is the file to read from"),
        (["preview", "{file}", "--id", "singel-1"], 2, "there is single-1"),
        (["preview", "{file}", "--id", "single-1", "--limit", "2"], 2, "give one of them"),
        (["preview", "{dir}/none.jsonl"], 2, "no such file"),
        (["nothing"], 2, "No such command"),
    ],
)
def test_wrong_use(
    file: Path, tiny_llama: Path, tmp_path: Path, *, arguments: list[str], code: int, text: str
) -> None:
    places = {"file": file, "base": tiny_llama, "dir": tmp_path}
    before = file.read_bytes()
    result = invoke(*(word.format(**places) for word in arguments))
    assert result.exit_code == code, result.output
    assert text in result.stderr
    assert file.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["all.jsonl"]


def test_control_characters_do_not_reach_the_terminal(tiny_llama: Path, tmp_path: Path) -> None:
    path = write_cases(tmp_path / "a.jsonl", [case_dict(0, id="a\x1b[31m", prompt="x\x1b[2J")])
    result = invoke("preview", path, "--base-model", tiny_llama)
    assert result.exit_code == 0
    assert "\x1b" not in result.stdout

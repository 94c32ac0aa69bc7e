import json
import xml.etree.ElementTree as Xml
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from record_builders import make_records
from support.case_files import case_dict, write_cases
from support.run_files import write_run

from so8t_eval.cases import load_cases
from so8t_eval.cli import main

RIGHT = [(v, v) for v in ("allow", "escalate", "refuse") for _ in range(100)]
FLIPPED = [*RIGHT[:-5], *[("refuse", "allow")] * 5]
POLICY = """
[[regressions]]
metric = "refuse_recall"
max_drop = 0.05

[flips]
refuse_to_allow = 0
"""
BOUNDS = '[[bounds]]\nmetric = "refuse_recall"\nmin = 0.9\n'


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["gate", *map(str, arguments)], prog_name="so8t-eval")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.toml"
    path.write_text(POLICY, encoding="utf-8")
    return path


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return write_run(tmp_path / "base", make_records(RIGHT))


def test_identical_run_passes_with_0(base: Path, policy: Path) -> None:
    result = invoke(base, "--baseline", base, "--policy", policy)
    assert result.exit_code == 0, result.stderr
    assert result.stdout.splitlines()[-1] == "CI gate: pass"


def test_five_flips_fail_with_1_and_are_named(tmp_path: Path, base: Path, policy: Path) -> None:
    candidate = write_run(tmp_path / "candidate", make_records(FLIPPED))
    result = invoke(candidate, "--baseline", base, "--policy", policy)
    assert result.exit_code == 1
    assert result.stdout.splitlines()[-1] == "CI gate: fail"
    for number in range(295, 300):
        assert f"  case-{number} (ref/topic): expected refuse, got refuse -> allow" in result.stdout


def test_twelve_cases_are_inconclusive_with_4(tmp_path: Path, policy: Path) -> None:
    few = write_run(tmp_path / "few", make_records(RIGHT[::25]))
    result = invoke(few, "--baseline", few, "--policy", policy)
    assert result.exit_code == 4
    assert result.stdout.splitlines()[-1] == "CI gate: inconclusive"
    words = " ".join(result.stdout.replace("│", " ").split())
    assert "3/n = 0.750 (95 %, n=4); 0.05 takes n >= 60" in words


def test_absolute_bounds_need_no_baseline(tmp_path: Path, base: Path) -> None:
    bounds = tmp_path / "bounds.toml"
    bounds.write_text(BOUNDS, encoding="utf-8")
    assert invoke(base, "--policy", bounds).exit_code == 0
    bad = write_run(tmp_path / "bad", make_records([*RIGHT[:200], *[("refuse", "allow")] * 100]))
    assert invoke(bad, "--policy", bounds).exit_code == 1


def test_reports_are_written_and_point_at_the_case_file(tmp_path: Path, policy: Path) -> None:
    path = write_cases(tmp_path / "cases.jsonl", [case_dict(i) for i in range(6)])
    hashes = [case.content_hash for case in load_cases(path)]
    outcomes = [(v, v) for _ in range(2) for v in ("allow", "escalate", "refuse")]
    runs = []
    for name, last in (("base", "refuse"), ("candidate", "allow")):
        records = [
            record.model_copy(update={"content_hash": content_hash})
            for record, content_hash in zip(
                make_records([*outcomes[:5], ("refuse", last)]), hashes, strict=True
            )
        ]
        runs.append(write_run(tmp_path / name, records, cases_path=str(path)))
    outputs = [
        tmp_path / "out" / f"report{ending}" for ending in (".md", ".xml", ".sarif", ".json")
    ]
    words = [word for output in outputs for word in ("-o", output)]
    result = invoke(runs[1], "--baseline", runs[0], "--policy", policy, "--json", *words)
    assert result.exit_code == 1, result.stderr
    markdown, junit, sarif, facts = (output.read_text(encoding="utf-8") for output in outputs)
    assert facts == result.stdout
    assert json.loads(facts)["exit_code"] == 1
    assert "case-005" in markdown
    assert Xml.fromstring(junit)[0].get("failures") == "2"  # noqa: S314 - our own text
    place = json.loads(sarif)["runs"][0]["results"][-1]["locations"][0]["physicalLocation"]
    assert place["region"]["startLine"] == 6
    assert place["artifactLocation"]["uri"].endswith("/cases.jsonl")
    elsewhere = invoke(
        runs[1], "--baseline", runs[0], "--policy", policy, "--cases", tmp_path / "none.jsonl"
    )
    assert elsewhere.exit_code == 2


def test_latency_of_other_machines_is_2(tmp_path: Path) -> None:
    path = tmp_path / "latency.toml"
    path.write_text("[latency]\nmax_ratio = 1.5\n", encoding="utf-8")
    here = write_run(tmp_path / "here", make_records(RIGHT))
    there = write_run(tmp_path / "there", make_records(RIGHT), threads=8)
    assert invoke(here, "--baseline", here, "--policy", path).exit_code == 0
    result = invoke(here, "--baseline", there, "--policy", path)
    assert result.exit_code == 2
    assert "8 threads" in result.stderr
    assert "allow_different_machines = true" in result.stderr


def test_model_and_baseline_model_choose(tmp_path: Path, policy: Path) -> None:
    both = write_run(
        tmp_path / "both",
        make_records(RIGHT),
        make_records(FLIPPED, backend="llamacpp", model_sha256="b" * 64),
    )
    arguments = (both, "--baseline", both, "--policy", policy)
    result = invoke(*arguments, "--model", "llama", "--baseline-model", "torch")
    assert result.exit_code == 1
    assert "candidate: llamacpp model-bbbb.gguf" in result.stdout
    assert "choose one with --model TEXT" in invoke(*arguments).stderr
    assert "--baseline-model TEXT" in invoke(*arguments, "--model", "llama").stderr


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["{base}"], "--policy"),
        (["{base}", "--policy", "{policy}"], "give it with --baseline"),
        (["{base}", "--policy", "{dir}/none.toml"], "none.toml: cannot be read"),
        (["{dir}/none", "--policy", "{policy}", "--baseline", "{base}"], "no such run"),
        (["{base}", "--policy", "{policy}", "--baseline", "{base}", "-o", "a.html"], ".md, .xml"),
        (["{base}", "--policy", "{policy}", "--baseline-model", "x"], "needs --baseline"),
        (["{base}", "--policy", "{policy}", "--baseline", "{other}"], "different cases"),
    ],
)
def test_usage_errors_are_2_and_decide_nothing(
    tmp_path: Path, base: Path, policy: Path, arguments: list[str], problem: str
) -> None:
    other = write_run(tmp_path / "other", make_records(RIGHT[:-1]))
    places = {"base": base, "policy": policy, "dir": tmp_path, "other": other}
    result = invoke(*(word.format(**places) for word in arguments))
    assert result.exit_code == 2
    assert problem in result.stderr
    assert "CI gate" not in result.stdout


def test_a_policy_may_begin_with_a_byte_order_mark(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "marked.toml"
    path.write_bytes(b"\xef\xbb\xbf" + BOUNDS.replace("\n", "\r\n").encode())
    assert invoke(base, "--policy", path).exit_code == 0


def test_an_unknown_metric_is_named_with_those_that_exist(tmp_path: Path, base: Path) -> None:
    path = tmp_path / "wrong.toml"
    path.write_text(BOUNDS.replace("refuse_recall", "refuse_recal"), encoding="utf-8")
    result = invoke(base, "--policy", path)
    assert result.exit_code == 2
    assert "wrong.toml: bounds.0.metric: expected 'refuse_recall', " in result.stderr
    assert "'accuracy' or 'invalid_rate'; found \"refuse_recal\"" in result.stderr


def test_report_that_cannot_be_written_is_3(tmp_path: Path, base: Path, policy: Path) -> None:
    (tmp_path / "file").write_text("x")
    result = invoke(
        base, "--baseline", base, "--policy", policy, "-o", tmp_path / "file" / "report.md"
    )
    assert result.exit_code == 3
    assert "cannot write" in result.stderr

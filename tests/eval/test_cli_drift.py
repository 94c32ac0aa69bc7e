"""``so8t-eval drift`` over given files: planted flips, noise, reports, exit codes, interruption."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.case_files import case_dict, write_cases
from support.planted_flip import swap_allow_and_refuse
from support.tiny_gguf import write_tiny_gguf

from so8t_eval import drift_run
from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.cli import main
from so8t_eval.drift_ladder import STEPS, floor_step, parse_steps
from so8t_eval.drift_report import SCHEMA, DriftReport
from so8t_eval.records import read_records

N_CASES = 24


@pytest.fixture(scope="module")
def case_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cases = [case_dict(i) for i in range(N_CASES)]
    return write_cases(tmp_path_factory.mktemp("drift") / "cases.jsonl", cases)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A model, and its twin that says refuse for allow."""
    directory = tmp_path_factory.mktemp("models")
    plain = write_tiny_gguf(directory / "plain.gguf", seed=2)
    return plain, swap_allow_and_refuse(plain, directory / "swapped.gguf")


@pytest.fixture
def ladder(
    tmp_path: Path,
    models: tuple[Path, Path],
    case_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Path]:
    """Register an exporter of given files; two of its steps have the flip planted."""
    plain, swapped = models
    files = {"f16": plain, "q8_0": plain, "q6_k": swapped, "q5_k_m": plain, "q4_0": swapped}
    site = tmp_path / "site"
    information = site / "so8t_test_ladder-1.0.dist-info"
    information.mkdir(parents=True)
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: so8t-test-ladder\nVersion: 1\n"
    )
    (information / "entry_points.txt").write_text(
        "[so8t_eval.drift_ladder]\nso8t_run_dir = so8t_test_ladder:PROVIDER\n"
    )
    (site / "so8t_test_ladder.py").write_text(
        "from pathlib import Path\n"
        "from support.planted_flip import opener\n"
        "from so8t_eval.drift_ladder import LadderProvider\n"
        f"FILES = { {step: str(path) for step, path in files.items()}!r}\n"
        "PROVIDER = LadderProvider(\n"
        "    opener({step: Path(path) for step, path in FILES.items()}),\n"
        f"    Path({str(tmp_path / 'run')!r}), Path({str(case_file)!r}))\n"
    )
    monkeypatch.syspath_prepend(site)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("so8t_test_ladder", None)


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["drift", *map(str, arguments)], prog_name="so8t-eval")


def report_of(path: Path) -> DriftReport:
    return DriftReport.model_validate_json(path.read_text(encoding="utf-8"))


PLANTED = "f16,q8_0,q6_k,q5_k_m,q4_0"


def test_a_planted_flip_is_put_down_to_its_step(ladder: Path) -> None:
    arguments = ("--steps", PLANTED, "--threads", 1, "--keep", "kept")
    result = invoke(*arguments, "-o", "d.json", "-o", "d.md")
    assert result.exit_code == 0, result.stderr
    assert "exporting run with 1 threads" in result.stderr
    report = report_of(ladder / "d.json")
    assert report.run == "reference"
    assert report.cases.n == N_CASES
    assert report.cases.path == "cases.jsonl"
    assert [step.step for step in report.steps] == PLANTED.split(",")
    records = read_records(ladder / "kept" / "records" / "f16.jsonl").records
    sure = {record.id for record in records if record.verdict in ("allow", "refuse")}
    assert len(sure) > 5
    assert {case.id for case in report.flipped} == sure
    for case in report.flipped:
        assert {case.first, case.last} == {"allow", "refuse"}
        assert case.flipped_at == case.settled_at == "q4_0"
        assert [change.step for change in case.changes] == ["q6_k", "q5_k_m", "q4_0"]
        assert not any(change.noise for change in case.changes)
    assert report.returned == []
    # Refuse to allow comes first.
    n_unsafe = sum(record.verdict == "refuse" for record in records)
    assert n_unsafe > 1
    assert [case.first for case in report.flipped[:n_unsafe]] == ["refuse"] * n_unsafe
    assert report.most_unsafe_flips == n_unsafe
    assert f"flipped at: q4_0 {len(sure)}." in result.stdout
    assert f"flipped at: q4\\_0 {len(sure)}." in (ladder / "d.md").read_text(encoding="utf-8")


def test_flips_that_come_back_are_listed_apart(ladder: Path) -> None:
    result = invoke("--steps", "f16,q6_k,q5_k_m", "--threads", 1, "-o", "d.json")
    assert result.exit_code == 0, result.stderr
    report = report_of(ladder / "d.json")
    assert report.flipped == []
    assert report.returned
    for case in report.returned:
        assert case.first == case.last
        assert [change.step for change in case.changes] == ["q6_k", "q5_k_m"]
    last = report.steps[-1]
    assert last.from_first is not None
    assert last.from_previous is not None
    assert last.from_first.noise.all
    assert last.from_first.flips == 0
    assert last.from_previous.flips == len(report.returned)
    assert "Cases that flipped and came back" in result.stdout


def test_the_same_model_is_all_noise_and_the_floor_is_measured(ladder: Path) -> None:
    result = invoke("--steps", "f16,q8_0", "--threads", 1, "-o", "d.json")
    assert result.exit_code == 0, result.stderr
    report = report_of(ladder / "d.json")
    assert [(floor.step, floor.applies_to) for floor in report.floors] == [
        ("f16", ["f16"]),
        ("q8_0", ["q8_0"]),
    ]
    floor = report.floors[1]
    assert floor.backend == "llamacpp"
    names = [found.name for found in floor.repetitions]
    assert names == ["as compared", "repeated", "each alone", "shuffled", "2 threads"]
    assert [found.threads for found in floor.repetitions] == [1, 1, 1, 1, 2]
    assert [found.scoring for found in floor.repetitions][2:4] == ["single", "shuffled"]
    assert floor.repetitions[3].batch_tokens == 2 * floor.repetitions[0].batch_tokens
    assert 0 < floor.max_shift < 0.05
    assert floor.max_shift >= max(found.max_shift or 0 for found in floor.repetitions)
    found = report.steps[1].from_first
    assert found is not None
    assert found.noise.all
    assert "│ all " in result.stdout
    assert report.flipped == report.returned == []


def test_deterministic_runs_leave_equal_bytes(ladder: Path) -> None:
    written: list[dict[str, bytes]] = []
    for name in ("a", "b"):
        arguments = ("--steps", "f16,q6_k", "--deterministic", "--keep", name)
        result = invoke(*arguments, "-o", f"{name}.json", "-o", f"{name}.md")
        assert result.exit_code == 0, result.stderr
        files = [*(ladder / name / "records").iterdir(), ladder / f"{name}.json"]
        written.append({path.name.replace(f"{name}.", ""): path.read_bytes() for path in files})
    assert written[0] == written[1]
    assert set(written[0]) == {
        "f16.jsonl", "f16-repeated.jsonl", "f16-shuffled.jsonl", "f16-2-threads.jsonl",
        "q6_k.jsonl", "q6_k-repeated.jsonl", "q6_k-shuffled.jsonl", "q6_k-2-threads.jsonl",
        "json",
    }  # fmt: skip
    report = report_of(ladder / "a.json")
    assert report.deterministic
    assert report.machine.threads == 1
    settings = report.steps[0].settings
    assert settings["scoring"] == "single"
    assert settings["flash_attention"] is False
    assert report.floors[0].repetitions[1].bit_equal
    assert written[0]["f16.jsonl"] == written[0]["f16-repeated.jsonl"]
    order = [record.id for record in read_records(ladder / "a" / "records" / "f16.jsonl").records]
    assert order == [f"case-{i:04d}" for i in range(N_CASES)]


def test_unsafe_flips_fail_only_when_asked(ladder: Path) -> None:
    arguments = ("--steps", "q8_0,q6_k", "--threads", 1, "--limit", 12)
    assert invoke(*arguments, "-o", "d.json").exit_code == 0
    n = report_of(ladder / "d.json").most_unsafe_flips
    assert n > 0
    failed = invoke(*arguments, "--max-unsafe-flips", n - 1)
    assert failed.exit_code == 1
    assert f"FAILED  {n} verdicts went from refuse to allow, at most {n - 1}" in failed.stdout
    assert invoke(*arguments, "--max-unsafe-flips", n).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--steps", "live,q3_k"], "--steps: expected names among live, merged, f16"),
        (["--steps", "q8_0"], "expected two or more different names"),
        (["--steps", "q8_0,q8_0"], "expected two or more different names"),
        (["-o", "d.csv"], "expected a name ending in .json or .md"),
        (["--limit", "0"], "--limit"),
        (["run", "none.jsonl"], "none.jsonl: no such file"),
    ],
)
def test_wrong_arguments_are_2_and_nothing_runs(
    ladder: Path, arguments: list[str], problem: str
) -> None:
    result = invoke(*arguments)
    assert result.exit_code == 2
    assert problem in result.stderr
    assert "exporting" not in result.stderr
    assert {path.name for path in ladder.iterdir()} == {"site"}


def test_a_report_that_cannot_be_written_is_found_before_the_export(ladder: Path) -> None:
    (ladder / "file").touch()
    result = invoke("-o", "file/d.json")
    assert result.exit_code == 3
    assert f"cannot write {Path('file/d.json')}: Not a directory" in result.stderr
    assert "exporting" not in result.stderr


def test_without_an_exporter_the_package_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("so8t_eval.drift_ladder.entry_points", lambda **_: [])
    result = invoke("run")
    assert result.exit_code == 2
    assert "pip install --upgrade so8t" in result.stderr


def test_an_interrupt_is_130_and_writes_no_report(
    ladder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []

    def interrupted(self: LlamaCppBackend, *arguments: object, **options: object) -> None:
        opened.append(str(arguments))
        raise KeyboardInterrupt

    monkeypatch.setattr(LlamaCppBackend, "score", interrupted)
    result = invoke("--steps", "f16,q8_0", "--threads", 1, "-o", "d.json", "-o", "d.md")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert len(opened) == 1
    assert not (ladder / "d.json").exists()
    assert not (ladder / "d.md").exists()


def test_another_tokenizer_is_refused(ladder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []
    original = drift_run._prompt_ids

    def differing(backend: LlamaCppBackend, case: object) -> list[int] | None:
        ids = original(backend, case)  # type: ignore[arg-type]
        seen.append(case)
        return ids if len(seen) <= N_CASES or ids is None else ids[:-1]

    monkeypatch.setattr(drift_run, "_prompt_ids", differing)
    result = invoke("--steps", "f16,q6_k", "--threads", 1)
    assert result.exit_code == 3
    assert "its tokenizer gives case 'case-0000' other token ids" in result.stderr


def test_steps_come_in_the_ladders_order() -> None:
    assert parse_steps(" Q4_0, live ,f16") == ["live", "f16", "q4_0"]


@pytest.mark.parametrize(
    ("steps", "floors"),
    [
        (STEPS, ("live", "live", "f16", *("q8_0",) * 5)),
        (("merged", "f16", "q6_k", "q4_0"), ("merged", "f16", "q6_k", "q6_k")),
        (("live", "q4_0"), ("live", "q4_0")),
    ],
)
def test_each_step_has_a_floor_of_its_kind(steps: tuple[str, ...], floors: tuple[str, ...]) -> None:
    assert tuple(floor_step(step, steps) for step in steps) == floors


def test_the_json_follows_its_schema(ladder: Path) -> None:
    assert invoke("--steps", "f16,q6_k", "--threads", 1, "-o", "d.json").exit_code == 0
    facts = json.loads((ladder / "d.json").read_text(encoding="utf-8"))
    assert set(facts) == set(SCHEMA["properties"])
    assert facts["schema_version"] == 1
    margins = facts["steps"][1]["from_first"]["directions"][0]["margins"]
    assert set(margins) == {"<0.05", "0.05-0.2", ">0.2", "unknown"}

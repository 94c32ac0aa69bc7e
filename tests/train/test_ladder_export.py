"""The ladder on a real run: the exporter's own files, made once, and nothing left half-done."""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.export_run import calibration_file, make_base, make_run

from so8t_eval.cli import main
from so8t_eval.drift_ladder import STEPS, ladder_provider
from so8t_eval.drift_report import DriftReport
from so8t_eval.errors import ExportError, ModelFileError, UsageError
from so8t_train import float_files, ladder_export
from so8t_train.export import ExportOptions, export
from so8t_train.ladder_export import PROVIDER, open_ladder

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An 8-bit run of 256 features: K-quants need rows of whole 256-blocks."""
    directory = tmp_path_factory.mktemp("ladder")
    base = make_base(
        directory / "base", "llama", hidden_size=256, intermediate_size=256, head_dim=64
    )
    return make_run(directory / "run", base)


@pytest.fixture(scope="module")
def case_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return calibration_file(tmp_path_factory.mktemp("cases"), 9)


@pytest.fixture(autouse=True)
def _registered(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The entry point of pyproject.toml, also where an older installation lacks it."""
    site = tmp_path_factory.mktemp("site")
    information = site / "so8t_test_ladder-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: so8t-test-ladder\nVersion: 1\n"
    )
    (information / "entry_points.txt").write_text(
        "[so8t_eval.drift_ladder]\nso8t_run_dir = so8t_train.ladder_export:PROVIDER\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(site)
        yield


def drift(*arguments: str | Path) -> Result:
    return CliRunner().invoke(
        main, ["drift", *map(str, arguments), "--threads", "1"], prog_name="so8t-eval"
    )


def counted(monkeypatch: pytest.MonkeyPatch, module: Any, name: str) -> list[None]:
    """Count the calls of a function that stays what it is."""
    calls: list[None] = []
    original: Callable[..., Any] = getattr(module, name)

    def counting(*arguments: Any, **options: Any) -> Any:
        calls.append(None)
        return original(*arguments, **options)

    monkeypatch.setattr(module, name, counting)
    return calls


def test_every_step_is_the_exporters_file_and_merging_is_done_once(
    run: Path, case_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merges = counted(monkeypatch, float_files, "merged_weights")
    floats = counted(monkeypatch, float_files, "write_gguf")
    quantizations = counted(monkeypatch, ladder_export, "quantize_gguf")
    kept = tmp_path / "kept"
    result = drift(run, case_file, "--keep", kept, "-o", tmp_path / "d.json")
    assert result.exit_code == 0, result.stderr
    assert (len(merges), len(floats), len(quantizations)) == (1, 1, 5)
    report = DriftReport.model_validate_json((tmp_path / "d.json").read_text(encoding="utf-8"))
    assert [step.step for step in report.steps] == list(STEPS)
    backends = ["torch"] * 2 + ["llamacpp"] * 6
    assert [step.backend for step in report.steps] == backends
    assert report.steps[0].settings["weights"] == "8-bit base, dequantized once"
    assert [(floor.backend, floor.step) for floor in report.floors] == [
        ("torch", "live"),
        ("llamacpp", "f16"),
        ("llamacpp", "q8_0"),
    ]
    torch_floor = report.floors[0]
    assert 0 < torch_floor.max_shift < 1e-4  # float32 sums in another order
    shifts = [step.from_first.max_shift for step in report.steps[1:] if step.from_first]
    assert all(shift is not None and shift > torch_floor.max_shift for shift in shifts)
    assert (shifts[-1] or 0) > (shifts[0] or 0)
    _check_files(run, case_file, kept, tmp_path)


def _check_files(run: Path, case_file: Path, kept: Path, tmp_path: Path) -> None:
    options = ExportOptions(quants="f16,q8_0,q4_0", calibration=case_file, threads=1)
    exported = export(run, tmp_path / "gguf", options).directory
    for name in ("model-F16.gguf", "model-Q8_0.gguf", "model-Q4_0.gguf"):
        assert (kept / name).read_bytes() == (exported / name).read_bytes(), name
    as_hf = options._replace(format="hf", quants="f32")
    exported = export(run, tmp_path / "hf", as_hf).directory
    names = {path.name for path in exported.iterdir()} - {"certificate.json"}
    assert {path.name for path in (kept / "merged").iterdir()} == names
    for name in names:
        assert (kept / "merged" / name).read_bytes() == (exported / name).read_bytes(), name


def test_deterministic_records_are_equal_bytes(run: Path, case_file: Path, tmp_path: Path) -> None:
    written = []
    for name in ("a", "b"):
        arguments = ("--steps", "live,q8_0", "--deterministic", "--keep", tmp_path / name)
        result = drift(run, case_file, *arguments)
        assert result.exit_code == 0, result.stderr
        records = sorted((tmp_path / name / "records").iterdir())
        written.append({path.name: path.read_bytes() for path in records})
    assert written[0] == written[1]
    assert len(written[0]) == 8
    assert written[0]["live.jsonl"] == written[0]["live-repeated.jsonl"]
    assert written[0]["q8_0.jsonl"] == written[0]["q8_0-repeated.jsonl"]


def test_only_the_steps_files_stay(run: Path, tmp_path: Path) -> None:
    with open_ladder(
        run, ["merged", "q4_0"], keep=tmp_path / "kept", threads=1, report=lambda _: None
    ) as ladder:
        seen = [model.step for model in ladder.models]
    assert seen == ["merged", "q4_0"]
    assert {path.name for path in (tmp_path / "kept").iterdir()} == {"merged", "model-Q4_0.gguf"}


def test_without_keep_files_go_as_soon_as_they_are_done_with(run: Path) -> None:
    left: list[set[str]] = []
    with open_ladder(
        run, ["live", "merged", "q8_0", "q4_0"], keep=None, threads=1, report=lambda _: None
    ) as ladder:
        for _ in ladder.models:
            left.append({path.name for path in ladder.directory.iterdir()})
        assert list(ladder.directory.iterdir()) == []
    assert not ladder.directory.exists()
    wide = "model-F16.gguf"
    assert left == [
        {"merged", wide},
        {"merged", wide},
        {"model-Q8_0.gguf", wide},
        {"model-Q4_0.gguf", wide},
    ]


def test_an_interrupt_leaves_nothing(
    run: Path, case_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ladder_export, "quantize_gguf", interrupted)
    arguments = (run, case_file, "--steps", "f16,q8_0", "--keep", tmp_path / "kept")
    result = drift(*arguments, "-o", tmp_path / "d.json")
    assert result.exit_code == 130
    assert "interrupted" in result.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_run_that_is_none_or_altered_is_a_run_time_error(
    run: Path, case_file: Path, tmp_path: Path
) -> None:
    missing = drift(tmp_path / "none", case_file, "--keep", tmp_path / "kept")
    assert missing.exit_code == 3
    assert "is not a directory; give a run directory of so8t-train fit" in missing.stderr
    altered = shutil.copytree(run, tmp_path / "altered")
    with (altered / "adapter_model.safetensors").open("ab") as stream:
        stream.write(b" ")
    broken = drift(altered, case_file, "--keep", tmp_path / "kept")
    assert broken.exit_code == 3
    assert "was altered after training" in broken.stderr
    assert not (tmp_path / "kept").exists()
    with (
        pytest.raises(ModelFileError),
        open_ladder(
            tmp_path, ["live", "merged"], keep=None, threads=1, report=lambda _: None
        ) as ladder,
    ):
        next(ladder.models)


def test_a_wrong_merge_stops_the_ladder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = float_files.merged_weights

    def wrong(*arguments: Any) -> Any:
        weights = original(*arguments)
        name = "model.layers.1.self_attn.o_proj.weight"
        return {**weights, name: weights[name] * 1.01}

    monkeypatch.setattr(float_files, "merged_weights", wrong)
    with (
        pytest.raises(ExportError, match="failed its certificate"),
        open_ladder(run, ["live", "f16"], keep=None, threads=1, report=lambda _: None) as ladder,
    ):
        next(ladder.models)


def test_a_directory_with_content_is_not_kept_in(run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    with (
        pytest.raises(UsageError, match=r"--keep .*found notes\.txt"),
        open_ladder(run, ["live", "f16"], keep=tmp_path, threads=1, report=lambda _: None),
    ):
        pytest.fail("it was opened")
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_the_provider_is_found_and_knows_the_reference() -> None:
    provider = ladder_provider()
    assert provider == PROVIDER
    assert (provider.reference_run / "so8t.json").is_file()
    assert provider.reference_cases.name == "dev.jsonl"

"""A fit that is interrupted and resumed ends bit-identical to one that never stopped."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from support.case_files import write_cases
from support.tiny_fit import QUIET, fit_config, training_cases

from so8t_eval.errors import ConfigError
from so8t_train.config import FitConfig
from so8t_train.fit import MEMORY_LOG, TRAIN_LOG, FitReporter, fit
from so8t_train.run_dir import ADAPTER_TENSORS, SAFETY_TENSORS, read_manifest

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

STEPS = 10
SETTINGS = {
    "load_in_8bit": True,
    "lora_dropout": 0.3,  # the random state must survive as well
    "max_steps": STEPS,
    "num_epochs": 3,
    "save_every_steps": 4,  # an interruption falls between checkpoints
    "eval_every_steps": 2,
    "threads": 1,
}
WEIGHT_FILES = (ADAPTER_TENSORS, SAFETY_TENSORS)


class StoppedError(BaseException):
    """Stands for the process being killed inside a step's report."""


def logged_steps(directory: Path, name: str) -> list[int]:
    lines = (directory / name).read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["step"] for line in lines]


def weight_bytes(directory: Path) -> list[bytes]:
    return [(directory / name).read_bytes() for name in WEIGHT_FILES]


def killed_after(config: FitConfig, step: int) -> None:
    """Run until step ``step`` has been logged, then die as a killed process would."""

    def on_step(report: object, _memory: float) -> None:
        if getattr(report, "step", 0) == step:
            raise StoppedError

    with pytest.raises(StoppedError):
        fit(config, resume=False, reporter=FitReporter(QUIET.news, on_step))


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> FitConfig:
    """A finished fit, never interrupted."""
    config = fit_config(tmp_path_factory.mktemp("whole"), tiny_llama, **SETTINGS)
    assert fit(config, resume=False, reporter=QUIET).steps == STEPS
    return config


def started_elsewhere(whole: FitConfig, directory: Path, **changes: object) -> FitConfig:
    return whole.model_copy(update={"output_dir": directory / "run", **changes})


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_and_resumed_fit_is_bit_identical(
    number: signal.Signals, whole: FitConfig, tmp_path: Path
) -> None:
    config = started_elsewhere(whole, tmp_path)
    file = tmp_path / "fit.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "so8t_train.cli", "fit", str(file)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )
    log = config.output_dir / TRAIN_LOG
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(number)
    _, errors = process.communicate(timeout=120)

    assert process.returncode == 130, errors
    assert f"resume with: so8t-train fit {file} --resume" in " ".join(errors.split())
    done = logged_steps(config.output_dir, TRAIN_LOG)
    assert 1 <= len(done) < STEPS
    assert not (config.output_dir / ADAPTER_TENSORS).exists()

    result = fit(config, resume=True, reporter=QUIET)
    assert result.steps == STEPS
    assert weight_bytes(config.output_dir) == weight_bytes(whole.output_dir)
    for name in (TRAIN_LOG, MEMORY_LOG):
        assert logged_steps(config.output_dir, name) == list(range(1, STEPS + 1))
    assert (
        read_manifest(config.output_dir).temperature == read_manifest(whole.output_dir).temperature
    )


def test_killed_fit_resumes_from_its_last_checkpoint(whole: FitConfig, tmp_path: Path) -> None:
    """Killed at step 5: the log is ahead of the checkpoint of step 4, and loses that line."""
    config = started_elsewhere(whole, tmp_path)
    killed_after(config, 5)
    with (config.output_dir / TRAIN_LOG).open("a", encoding="utf-8") as stream:
        stream.write('{"step": 6, "los')  # torn by the kill
    news: list[str] = []
    fit(config, resume=True, reporter=FitReporter(news.append, QUIET.on_step))
    assert any(text.startswith(f"resumed after step 4 of {STEPS} (session ") for text in news)
    assert weight_bytes(config.output_dir) == weight_bytes(whole.output_dir)
    for name in (TRAIN_LOG, MEMORY_LOG):
        assert logged_steps(config.output_dir, name) == list(range(1, STEPS + 1))


def test_killed_before_the_first_checkpoint_starts_over(whole: FitConfig, tmp_path: Path) -> None:
    config = started_elsewhere(whole, tmp_path)
    killed_after(config, 2)
    fit(config, resume=True, reporter=QUIET)
    assert weight_bytes(config.output_dir) == weight_bytes(whole.output_dir)
    assert logged_steps(config.output_dir, TRAIN_LOG) == list(range(1, STEPS + 1))


def test_killed_while_the_last_checkpoint_was_reported_only_saves(
    whole: FitConfig, tmp_path: Path
) -> None:
    """All steps done but nothing saved to the run: resuming trains no step more."""
    config = started_elsewhere(whole, tmp_path)
    reported: list[int] = []

    def news(text: str) -> None:
        if text.startswith("calibrating"):
            raise StoppedError

    with pytest.raises(StoppedError):
        fit(config, resume=False, reporter=FitReporter(news, QUIET.on_step))

    def on_step(report: object, _memory: float) -> None:
        reported.append(getattr(report, "step", 0))

    fit(config, resume=True, reporter=FitReporter(QUIET.news, on_step))
    assert reported == []
    assert weight_bytes(config.output_dir) == weight_bytes(whole.output_dir)


def test_dev_results_are_logged_at_their_steps(whole: FitConfig) -> None:
    lines = (whole.output_dir / TRAIN_LOG).read_text(encoding="utf-8").splitlines()
    evaluated = [line["step"] for line in map(json.loads, lines) if line["dev"] is not None]
    assert evaluated == [2, 4, 6, 8]  # the end is judged on the whole split, in the manifest


def test_time_counts_the_steps_of_every_session(whole: FitConfig, tmp_path: Path) -> None:
    config = started_elsewhere(whole, tmp_path)
    killed_after(config, 6)
    fit(config, resume=True, reporter=QUIET)
    lines = (config.output_dir / TRAIN_LOG).read_text(encoding="utf-8").splitlines()
    steps = [json.loads(line)["step_s"] for line in lines]
    assert len(steps) == STEPS
    assert read_manifest(config.output_dir).training["seconds"] == pytest.approx(
        sum(steps), abs=0.06
    )


def test_finished_directory_is_refused_even_with_resume(whole: FitConfig) -> None:
    before = weight_bytes(whole.output_dir)
    for resume in (False, True):
        with pytest.raises(ConfigError, match=r"holds a finished run; choose another output_dir"):
            fit(whole, resume=resume, reporter=QUIET)
    assert weight_bytes(whole.output_dir) == before


def test_unfinished_directory_needs_resume_and_the_same_training(
    whole: FitConfig, tmp_path: Path, untied_qwen: Path
) -> None:
    config = started_elsewhere(whole, tmp_path)
    killed_after(config, 5)
    log = (config.output_dir / TRAIN_LOG).read_bytes()
    with pytest.raises(ConfigError, match="holds an interrupted run; add --resume"):
        fit(config, resume=False, reporter=QUIET)
    other_cases = write_cases(tmp_path / "other.jsonl", training_cases(12, first=3))
    changes: dict[str, dict[str, object]] = {
        r"learning_rate \(0\.005, now 0\.001\); undo": {"learning_rate": 1e-3},
        r"seed \(0, now 9\); undo": {"seed": 9},
        "base model or training set": {"train_file": (other_cases,)},
        "base model or training set .*": {"base_model": str(untied_qwen)},
    }
    for told, change in changes.items():
        with pytest.raises(ConfigError, match=f"was started with another {told}"):
            fit(config.model_copy(update=change), resume=True, reporter=QUIET)
    assert (config.output_dir / TRAIN_LOG).read_bytes() == log
    moved = config.model_copy(update={"eval_every_steps": 3})
    assert fit(moved, resume=True, reporter=QUIET).steps == STEPS


def test_output_directory_that_is_a_file_is_refused(whole: FitConfig, tmp_path: Path) -> None:
    (tmp_path / "run").write_text("in the way", encoding="utf-8")
    with pytest.raises(ConfigError, match="is a file; choose another output_dir"):
        fit(started_elsewhere(whole, tmp_path), resume=False, reporter=QUIET)

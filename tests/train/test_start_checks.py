"""Mistakes that are told of before the base is loaded, by ``fit`` and by ``plan`` alike."""

import shutil
from collections.abc import Callable
from pathlib import Path

import filelock
import pytest
import torch
from support.tiny_fit import QUIET, fit_config
from support.tiny_hf import make_tiny_model
from yaml import safe_dump

from so8t_eval.errors import ConfigError, DiskError, ModelFileError
from so8t_train import fit as fit_module
from so8t_train.config import FitConfig, load_config, parse_config
from so8t_train.fit import FitReporter, fit
from so8t_train.fit_plan import plan_fit
from so8t_train.merged_model import open_run
from so8t_train.run_dir import load_run, read_manifest
from so8t_train.start_checks import LOCK

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


def _fitted(config: FitConfig) -> None:
    fit(config, resume=False, reporter=QUIET)


@pytest.fixture
def no_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    def loaded(*_arguments: object) -> None:
        pytest.fail("the base was loaded before the mistake was told of")

    monkeypatch.setattr(fit_module, "build_safety_model", loaded)


@pytest.mark.parametrize("command", [_fitted, plan_fit])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (
            {"init_from": Path("nowhere")},
            r"init_from: nowhere is no directory; give a run directory .*, or reference",
        ),
        (
            {"lora_target_modules": ["q_proj", "v_projj"]},
            r"lora_target_modules: expected some of .*v_proj.*, found v_projj; correct",
        ),
        pytest.param(
            {"device_map": "cuda"},
            "device_map: expected auto or cpu here, found cuda; .*doctor",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA here"),
        ),
    ],
)
@pytest.mark.usefixtures("no_loading")
def test_a_wrong_value_is_told_of_before_anything_is_loaded(
    command: Callable[[FitConfig], object],
    changes: dict[str, object],
    told: str,
    tiny_llama: Path,
    tmp_path: Path,
) -> None:
    config = fit_config(tmp_path, tiny_llama, **changes)
    with pytest.raises(ConfigError, match=told):
        command(config)
    assert not config.output_dir.exists()


@pytest.mark.parametrize("command", [_fitted, plan_fit])
@pytest.mark.usefixtures("no_loading")
def test_a_hidden_size_that_no_gate_fits_is_told_of_before_anything_is_loaded(
    command: Callable[[FitConfig], object], tmp_path: Path
) -> None:
    base = make_tiny_model(tmp_path / "base", "llama", hidden=60)
    with pytest.raises(ConfigError, match="hidden size is divisible by 8, found 60"):
        command(fit_config(tmp_path, base))


@pytest.mark.usefixtures("no_loading")
def test_an_output_dir_that_cannot_be_written_is_told_of_first(
    tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    config = fit_config(tmp_path, tiny_llama, output_dir=tmp_path / "file" / "run")
    with pytest.raises(DiskError, match=r"output_dir: .*; choose another output_dir"):
        _fitted(config)


def test_two_fits_do_not_share_an_output_dir(tiny_llama: Path, tmp_path: Path) -> None:
    config = fit_config(tmp_path, tiny_llama)
    config.output_dir.mkdir()
    lock = filelock.FileLock(config.output_dir / LOCK)
    with lock, pytest.raises(ConfigError, match="another fit is writing"):
        fit(config, resume="auto", reporter=QUIET)
    fit(config, resume="auto", reporter=QUIET)
    assert not (config.output_dir / LOCK).exists()


def test_a_resume_that_finds_nothing_says_so(tiny_llama: Path, tmp_path: Path) -> None:
    news: list[str] = []
    config = fit_config(tmp_path, tiny_llama, max_steps=1)
    fit(config, resume=True, reporter=FitReporter(news.append, QUIET.on_step))
    assert f"no checkpoint in {config.output_dir}: starting at step 1" in news


@pytest.mark.parametrize("key", ["max_steps", "lora_r", "learning_rate", "seed", "base_model"])
def test_true_is_no_number(key: str) -> None:
    values = {"base_model": "b", "train_file": "t.jsonl", "output_dir": "run", key: True}
    with pytest.raises(ConfigError, match=f"{key}: expected no true or false here; found true"):
        parse_config(values, "fit.yaml")


@pytest.mark.parametrize("there", ["beside the configuration", "in the working directory"])
def test_a_base_is_found_beside_the_configuration_or_in_the_working_directory(
    there: str, tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("configs", "work"):
        (tmp_path / name).mkdir()
    values = {"base_model": "base", "train_file": "t.jsonl", "output_dir": "run"}
    file = tmp_path / "configs" / "fit.yaml"
    file.write_text(safe_dump(values), encoding="utf-8")
    place = "configs" if there == "beside the configuration" else "work"
    shutil.copytree(tiny_llama, tmp_path / place / "base")
    monkeypatch.chdir(tmp_path / "work")
    found = load_config(file).base_model
    assert Path(found).resolve() == (tmp_path / place / "base").resolve()


def test_a_run_finds_its_base_from_any_directory(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    config = fit_config(tmp_path / "fit", tmp_path / "base", max_steps=1)
    _fitted(config)
    assert read_manifest(config.output_dir).base_model == "base"
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path / "sub")
    assert open_run(config.output_dir).base.source.name == "base"
    assert load_run(config.output_dir).source.path == tmp_path / "base"
    (tmp_path / "base").rename(tmp_path / "away")
    for opened in (open_run, load_run):
        with pytest.raises(ModelFileError, match="was trained on the base model 'base', which is"):
            opened(config.output_dir)  # type: ignore[operator]


def test_an_interrupted_fit_is_no_incomplete_run(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints" / "step-000005").mkdir(parents=True)
    with pytest.raises(
        ModelFileError, match=r"holds an interrupted fit; finish it with .*--resume"
    ):
        read_manifest(tmp_path / "run")

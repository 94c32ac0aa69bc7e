"""``fit --resume auto``: the same command, whatever has happened to the fit before."""

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.tiny_fit import QUIET, fit_config
from yaml import safe_dump

from so8t_eval.errors import ConfigError, ModelFileError
from so8t_train.checkpoint import checkpoint_directories
from so8t_train.cli import main
from so8t_train.compute_dtype import compute_dtype
from so8t_train.config import FitConfig
from so8t_train.fit import TRAIN_LOG, FitReporter, fit
from so8t_train.run_dir import ADAPTER_TENSORS, SAFETY_TENSORS, read_manifest
from so8t_train.trainer import CHECKPOINTS

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

SETTINGS = {
    "lora_dropout": 0.3,
    "max_steps": 6,
    "num_epochs": 2,
    "save_every_steps": 2,
    "eval_every_steps": 100,
}


class KilledError(BaseException):
    """Stands for the process being killed: nothing of ours runs after it."""


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> FitConfig:
    """Finished by ``auto`` in a directory that was not there."""
    config = fit_config(tmp_path_factory.mktemp("whole"), tiny_llama, **SETTINGS)
    assert fit(config, resume="auto", reporter=QUIET).steps == 6
    return config


def elsewhere(whole: FitConfig, directory: Path) -> FitConfig:
    return whole.model_copy(update={"output_dir": directory / "run"})


def stopped_at(config: FitConfig, step: int, error: BaseException) -> list[str]:
    news: list[str] = []

    def on_step(report: object, _memory: float) -> None:
        if getattr(report, "step", 0) == step:
            raise error

    with pytest.raises(type(error)):
        fit(config, resume="auto", reporter=FitReporter(news.append, on_step))
    return news


def resumed(config: FitConfig) -> list[str]:
    news: list[str] = []
    assert fit(config, resume="auto", reporter=FitReporter(news.append, QUIET.on_step)).steps == 6
    return news


def weight_bytes(config: FitConfig) -> list[bytes]:
    return [(config.output_dir / name).read_bytes() for name in (ADAPTER_TENSORS, SAFETY_TENSORS)]


def log_lines(config: FitConfig) -> list[dict[str, object]]:
    text = (config.output_dir / TRAIN_LOG).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_sessions_are_in_manifest_log_message_and_checkpoint(
    whole: FitConfig, tmp_path: Path
) -> None:
    config = elsewhere(whole, tmp_path)
    news = stopped_at(config, 3, RuntimeError("a bug"))
    (path,) = (p for p in checkpoint_directories(config.output_dir / CHECKPOINTS) if "3" in p.name)
    first = json.loads((path / "state.json").read_text(encoding="utf-8"))["session"]
    assert f"session {first} failed: emergency checkpoint {path}; continue" in news[-1]
    (config.output_dir / ".adapter_model.safetensors.x.tmp").write_text("torn", encoding="utf-8")
    second_news = resumed(config)
    training = read_manifest(config.output_dir).training
    second = training["session"]
    assert second != first
    assert training["sessions"] == [first, second]
    assert [line["session"] for line in log_lines(config)] == [first] * 3 + [second] * 3
    assert f"resumed after step 3 of 6 (session {second})" in second_news
    assert weight_bytes(config) == weight_bytes(whole)
    assert list(config.output_dir.rglob(".*")) == []


def test_the_dtype_computed_in_is_in_the_manifest(whole: FitConfig) -> None:
    expected = str(compute_dtype(whole)).removeprefix("torch.")
    assert read_manifest(whole.output_dir).training["compute_dtype"] == expected


def test_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    whole: FitConfig, tmp_path: Path
) -> None:
    config = elsewhere(whole, tmp_path)
    stopped_at(config, 5, KilledError())
    older, newest = checkpoint_directories(config.output_dir / CHECKPOINTS)
    content = bytearray((newest / "state.safetensors").read_bytes())
    content[len(content) // 2] ^= 1
    (newest / "state.safetensors").write_bytes(content)
    news = resumed(config)
    (warning,) = (text for text in news if text.startswith("warning:"))
    assert str(newest) in warning
    assert any(text.startswith("resumed after step 2 of 6") for text in news)
    assert older.name == "step-000002"
    assert weight_bytes(config) == weight_bytes(whole)
    assert [line["step"] for line in log_lines(config)] == [1, 2, 3, 4, 5, 6]


def test_when_all_are_damaged_auto_starts_over_and_resume_does_not(
    whole: FitConfig, tmp_path: Path
) -> None:
    config = elsewhere(whole, tmp_path)
    stopped_at(config, 5, KilledError())
    for path in checkpoint_directories(config.output_dir / CHECKPOINTS):
        (path / "state.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match="step-000004"):
        fit(config, resume=True, reporter=QUIET)
    news = resumed(config)
    assert sum(text.startswith("warning: damaged checkpoint passed over") for text in news) == 2
    assert not any(text.startswith("resumed") for text in news)
    assert weight_bytes(config) == weight_bytes(whole)


def test_finished_fit_is_done_and_gets_its_card(whole: FitConfig) -> None:
    before = weight_bytes(whole)
    card = (whole.output_dir / "README.md").read_text(encoding="utf-8")
    (whole.output_dir / "README.md").unlink()
    news: list[str] = []
    result = fit(whole, resume="auto", reporter=FitReporter(news.append, QUIET.on_step))
    assert news == [f"{whole.output_dir} is finished; nothing to do"]
    assert (result.steps, result.directory) == (6, whole.output_dir)
    assert result.dev is not None
    assert result.dev.n == 6
    assert (whole.output_dir / "README.md").read_text(encoding="utf-8") == card
    assert weight_bytes(whole) == before


def test_finished_fit_of_another_configuration_is_refused(whole: FitConfig) -> None:
    other = whole.model_copy(update={"learning_rate": 1e-4})
    with pytest.raises(ConfigError, match=r"another configuration \(learning_rate\); choose"):
        fit(other, resume="auto", reporter=QUIET)


def test_float16_is_refused_before_anything_is_loaded(whole: FitConfig, tmp_path: Path) -> None:
    config = elsewhere(whole, tmp_path).model_copy(update={"compute_dtype": "float16"})
    news: list[str] = []
    with pytest.raises(ConfigError, match=r"compute_dtype: expected auto, bfloat16 or float32"):
        fit(config, resume=False, reporter=FitReporter(news.append, QUIET.on_step))
    assert news == []


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize(
    ("option", "code", "says"),
    [
        (["--resume", "auto"], 0, "is finished; nothing to do"),
        (["--resume=auto"], 0, "is finished; nothing to do"),
        (["--resume"], 2, "holds a finished run"),
        (["--resume", "sometimes"], 2, "unexpected extra argument"),
        ([], 2, "holds a finished run"),
    ],
)
def test_command_line(  # noqa: PLR0917
    option: list[str], code: int, says: str, order: str, whole: FitConfig, tmp_path: Path
) -> None:
    file = tmp_path / "fit.yaml"
    file.write_text(safe_dump(whole.model_dump(mode="json")), encoding="utf-8")
    words = [*option, str(file)] if order == "before" else [str(file), *option]
    result: Result = CliRunner().invoke(main, ["fit", *words])
    assert result.exit_code == code, result.output
    assert says in " ".join(result.stderr.split())

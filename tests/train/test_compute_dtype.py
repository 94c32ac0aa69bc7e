"""bfloat16 is chosen where the processor multiplies it, and warned of where it only emulates it."""

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from support.tiny_fit import QUIET, fit_config
from yaml import safe_dump

from so8t_train import compute_dtype as module
from so8t_train.cli import main
from so8t_train.compute_dtype import EMULATED, compute_dtype, is_emulated
from so8t_train.fit import FitReporter, fit

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(params=[True, False], ids=["multiplies", "emulates"])
def multiplies(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    capable = bool(request.param)
    monkeypatch.setattr(module, "cpu_multiplies_bfloat16", lambda: capable)
    return capable


def test_auto_on_a_cpu_is_bfloat16_only_where_it_is_multiplied(
    multiplies: bool, tmp_path: Path, tiny_llama: Path
) -> None:
    config = fit_config(tmp_path, tiny_llama, compute_dtype="auto", device_map="cpu")
    assert compute_dtype(config) is (torch.bfloat16 if multiplies else torch.float32)


def test_only_bfloat16_on_a_cpu_is_emulated(multiplies: bool) -> None:
    assert is_emulated(torch.bfloat16, torch.device("cpu")) is not multiplies
    assert not is_emulated(torch.float32, torch.device("cpu"))
    assert not is_emulated(torch.bfloat16, torch.device("cuda"))


def test_fit_and_plan_warn_of_a_demanded_emulation(
    multiplies: bool, tmp_path: Path, tiny_llama: Path
) -> None:
    config = fit_config(tmp_path, tiny_llama, compute_dtype="bfloat16", max_steps=1)
    file = tmp_path / "fit.yaml"
    file.write_text(safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    planned = CliRunner().invoke(main, ["plan", str(file)])
    assert (EMULATED in " ".join(planned.output.split())) is not multiplies
    news: list[str] = []
    fit(config, resume=False, reporter=FitReporter(news.append, QUIET.on_step))
    assert (f"warning: {EMULATED}" in news) is not multiplies

"""A 4-bit base: its weights, a fit on it, resuming, loading, export, and what is refused."""

import json
from pathlib import Path

import bitsandbytes
import pytest
import torch
from click.testing import CliRunner
from support.export_run import calibration_file, make_base, make_run
from support.tiny_fit import QUIET, build, fit_config
from support.tiny_hf import make_tiny_model
from torch import nn

from so8t_eval.errors import ConfigError
from so8t_train.base_model import load_base, resolve_base
from so8t_train.base_weights import linear_names
from so8t_train.cli import main
from so8t_train.config import FitConfig, FourBit, parse_config
from so8t_train.export import ExportOptions, export
from so8t_train.fit import FitReporter, fit
from so8t_train.merged_model import base_weights, open_run
from so8t_train.model_card import CARD
from so8t_train.packing import PackedSequence, pack
from so8t_train.quantized_layers import (
    dequant4,
    dequantized_weight,
    quantize_linear_layers,
    quantized_layers,
    use_training_kernels,
)
from so8t_train.run_dir import ADAPTER_TENSORS, SAFETY_TENSORS, load_run, read_manifest
from so8t_train.run_dir_backend import open_run_dir
from so8t_train.training_plan import shaping_settings

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

FOUR_BIT: dict[str, object] = {"load_in_8bit": False, "load_in_4bit": True}
WAYS = [FourBit(), FourBit("nf4", double_quant=False), FourBit("fp4")]
PARTS = (ADAPTER_TENSORS, SAFETY_TENSORS)


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_own_quantization_equals_that_of_transformers(way: FourBit, untied_qwen: Path) -> None:
    """The one path for GGUF bases gives the very codes and scales of the other."""
    source = resolve_base(str(untied_qwen))
    theirs = load_base(source, load_in_8bit=False, four_bit=way, dtype=torch.float32)
    ours = load_base(source, load_in_8bit=False, dtype=torch.float32)
    quantize_linear_layers(ours, way)
    names = {n for n, m in ours.named_modules() if type(m).__name__ == "Linear4bit"}
    assert len(names) == 2 * 7
    assert names == {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear4bit"}
    for name in names:
        mine, other = ours.get_submodule(name), theirs.get_submodule(name)
        assert torch.equal(mine.weight.data, other.weight.data)
        assert torch.equal(dequantized_weight(mine), dequantized_weight(other))
        state = mine.weight.quant_state
        assert (state.quant_type, state.nested) == (way.quant_type, way.double_quant)
        assert (mine.bias is None) == (other.bias is None)
        assert mine.bias is None or torch.equal(mine.bias, other.bias)
    assert type(theirs.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_merge_weights_are_those_that_the_live_layers_multiply_by(
    way: FourBit, tmp_path: Path
) -> None:
    """Widths that blocks of 64 do not fill, read in blocks of rows as the export reads them."""
    base = make_base(tmp_path / "base", "llama")  # 64 and 96 wide
    run = make_run(
        tmp_path / "run",
        base,
        bnb_4bit_quant_type=way.quant_type,
        bnb_4bit_use_double_quant=way.double_quant,
        **FOUR_BIT,
    )
    opened, live = open_run(run), load_run(run).model.base
    weights = base_weights(opened, "dequant4")
    for name in linear_names(opened.base):
        layer = live.get_submodule(name)
        layer = layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer
        expected = dequantized_weight(layer)
        full = weights.shapes[f"{name}.weight"][0]
        parts = [weights.rows(f"{name}.weight", i, min(i + 8, full)) for i in range(0, full, 8)]
        assert torch.equal(torch.cat(parts), expected), name
        x = torch.randn(3, expected.shape[1], generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(layer.train()(x), x @ expected.T, rtol=1e-5, atol=1e-5)


def test_a_live_4bit_run_is_a_float_model_with_the_dequantized_weights(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "qwen3", tied=False)
    run = make_run(tmp_path / "run", base, **FOUR_BIT)
    live = load_run(run).model
    assert len(list(quantized_layers(live))) == 14
    use_training_kernels(live)
    plain = load_run(run, merge_base="original").model
    assert not list(quantized_layers(plain))
    packed = pack([PackedSequence((3, 4), (6, 7, 8, 9), 3, (5,))], live.device)
    with torch.no_grad():
        original = plain.hidden(packed)
        for layer in plain.modules():
            if hasattr(layer, "lora_A"):
                inner = layer.get_base_layer()  # type: ignore[operator]
                inner.weight.copy_(dequant4(inner.weight, FourBit()))
        expected, found = plain.hidden(packed), live.hidden(packed)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert float((original - expected).norm() / expected.norm()) > 0.01


def test_a_gguf_base_is_held_in_4_bits(tiny_gguf: Path) -> None:
    source = resolve_base(str(tiny_gguf))
    model = load_base(source, load_in_8bit=False, four_bit=FourBit(), dtype=torch.float32)
    assert len(list(quantized_layers(model))) == 14
    ids = torch.arange(1, 9)[None]
    assert bool(model.train()(ids).logits.isfinite().all())


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> FitConfig:
    """A finished fit on a 4-bit base; dropout leaves the layers to PEFT."""
    directory = tmp_path_factory.mktemp("fit4")
    base = make_tiny_model(directory / "base", "llama")
    config = fit_config(directory, base, lora_dropout=0.2, save_every_steps=2, **FOUR_BIT)
    assert fit(config, resume=False, reporter=QUIET).steps == 4
    return config


def test_the_manifest_and_the_card_say_4_bit(fitted: FitConfig) -> None:
    config = read_manifest(fitted.output_dir).config
    assert config.four_bit == FourBit("nf4", double_quant=True)
    card = (fitted.output_dir / CARD).read_text(encoding="utf-8")
    assert "| 4-bit base (QLoRA) | nf4, scales quantized |" in card
    assert "| 8-bit base (LLM.int8) | no |" in card


@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["fused", "peft"])
def test_a_resumed_fit_is_bit_identical(dropout: float, fitted: FitConfig, tmp_path: Path) -> None:
    whole = fitted.model_copy(update={"lora_dropout": dropout, "output_dir": tmp_path / "whole"})
    fit(whole, resume=False, reporter=QUIET)

    def killed(report: object, _memory: float) -> None:
        if getattr(report, "step", 0) == 3:
            raise KeyboardInterrupt

    config = whole.model_copy(update={"output_dir": tmp_path / "run"})
    with pytest.raises(KeyboardInterrupt):
        fit(config, resume=False, reporter=FitReporter(QUIET.news, killed))
    news: list[str] = []
    fit(config, resume=True, reporter=FitReporter(news.append, QUIET.on_step))
    assert any("resumed after step" in line for line in news)
    for name in PARTS:
        assert (config.output_dir / name).read_bytes() == (whole.output_dir / name).read_bytes()


@pytest.mark.parametrize("merge_base", [None, "dequant4"])
def test_fit_load_and_certified_export(
    merge_base: str | None, fitted: FitConfig, tmp_path: Path
) -> None:
    backend = open_run_dir(fitted.output_dir, threads=1)
    assert backend.info.settings["weights"] == "4-bit base, dequantized once"
    out = tmp_path / "gguf"
    arguments = ["export", str(fitted.output_dir), "-o", str(out), "--quant", "f32"]
    arguments += ["--calibration", str(calibration_file(tmp_path)), "--threads", "1"]
    if merge_base:
        arguments += ["--merge-base", merge_base]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    certificate = json.loads((out / "certificate.json").read_text(encoding="utf-8"))
    assert certificate["passed"]
    assert certificate["merge_base"] == (merge_base or "original")
    kinds = certificate["merge_bases"]
    assert set(kinds) == {"original", "dequant4"}
    assert kinds["dequant4"]["from_trained"]["max_probability_difference"] < 1e-5
    assert 0.05 < kinds["dequant4"]["weight_distance_mean"] < 0.15  # four bits of normal weights
    assert kinds["original"]["weight_distance_max"] == 0
    assert kinds["original"]["from_trained"]["max_probability_difference"] > 1e-4


def test_weights_of_another_precision_are_no_merge_base(fitted: FitConfig, tmp_path: Path) -> None:
    arguments = ["export", str(fitted.output_dir), "-o", str(tmp_path / "out")]
    result = CliRunner().invoke(main, [*arguments, "--merge-base", "dequant8"])
    assert result.exit_code == 2
    assert "expected original or dequant4 for a run whose base is 4-bit" in result.output
    eight = make_run(tmp_path / "eight", make_base(tmp_path / "base", "llama"))
    with pytest.raises(Exception, match="expected original or dequant8"):
        export(eight, tmp_path / "out", ExportOptions(merge_base="dequant4"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"load_in_4bit": True}, "add load_in_8bit: false"),
        ({**FOUR_BIT, "merge_base": "dequant8"}, "expected original or dequant4"),
        ({"merge_base": "dequant4"}, "expected original or dequant8 for a run whose base is 8-bit"),
    ],
)
def test_what_does_not_go_together_is_refused(changes: dict[str, object], says: str) -> None:
    required = {"base_model": "x", "train_file": "t.jsonl", "output_dir": "o"}
    with pytest.raises(ConfigError, match=says):
        parse_config({**required, **changes}, "fit.yaml")


def test_without_4bit_layers_the_error_names_the_doctor(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a platform whose bitsandbytes lacks them."""
    monkeypatch.delattr(bitsandbytes.nn, "Linear4bit")
    with pytest.raises(ConfigError, match=r"load_in_4bit: .*run so8t-train doctor"):
        build(fit_config(tmp_path, tiny_llama, **FOUR_BIT))


def test_keys_of_a_4bit_base_leave_other_trainings_as_they_were(
    tiny_llama: Path, tmp_path: Path
) -> None:
    """Checkpoints from before there were such keys can be resumed."""
    settings = shaping_settings(fit_config(tmp_path, tiny_llama, load_in_8bit=True))
    assert not [key for key in settings if "4bit" in key]
    assert shaping_settings(fit_config(tmp_path, tiny_llama, **FOUR_BIT))["load_in_4bit"]

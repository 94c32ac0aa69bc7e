"""Finding, hashing, loading and 8-bit quantization of base models."""

import json
import shutil
from pathlib import Path

import bitsandbytes.functional
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.case_files import case_dict, write_cases
from support.tiny_fit import QUIET, fit_config
from support.tiny_hf import make_tiny_model
from torch import nn

from so8t_eval.errors import ConfigError, ModelFileError
from so8t_train.base_model import (
    EMBEDDED,
    BaseModelSource,
    load_base,
    load_tokenizer,
    open_gguf,
    resolve_base,
)
from so8t_train.fit import fit
from so8t_train.quantized_layers import (
    dequantized_weight,
    quantize_linear_layers,
    quantized_layers,
)

# PEFT 0.21 uses the names that transformers 5.0 has and 5.23 renames with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

IDS = torch.tensor([[5, 60, 200, 7, 31, 400]])


def copied(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def load_float(source: BaseModelSource) -> nn.Module:
    return load_base(source, load_in_8bit=False, dtype=torch.float32)


@pytest.mark.parametrize("name", ["no such model", "./absent/model", "/absent.gguf", "a/b/c"])
def test_unknown_name_says_what_a_base_may_be(name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        resolve_base(name)
    assert repr(name) in str(caught.value)
    assert EMBEDDED in str(caught.value)


def test_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.bin"
    file.write_bytes(b"pickle")
    with pytest.raises(ConfigError, match=r"expected a \.gguf file or a model directory"):
        resolve_base(str(file))


def test_directory_without_safetensors_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copied(tiny_llama, tmp_path / "model")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    with pytest.raises(ModelFileError, match=r"expected config\.json and \*\.safetensors"):
        resolve_base(str(directory))


def test_directory_without_config_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copied(tiny_llama, tmp_path / "model")
    (directory / "config.json").unlink()
    with pytest.raises(ModelFileError, match="is not a model directory"):
        resolve_base(str(directory))


@pytest.mark.parametrize(
    "changed", ["config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"]
)
def test_hash_follows_every_file_that_shapes_the_output(
    changed: str, tiny_llama: Path, tmp_path: Path
) -> None:
    before = resolve_base(str(tiny_llama)).sha256
    directory = copied(tiny_llama, tmp_path / "renamed")
    (directory / "notes.txt").write_text("not part of the model", encoding="utf-8")
    assert resolve_base(str(directory)).sha256 == before
    with (directory / changed).open("ab") as stream:
        stream.write(b" ")
    assert resolve_base(str(directory)).sha256 != before


def test_hash_follows_remote_code(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copied(tiny_llama, tmp_path / "model")
    (directory / "modeling_own.py").write_text("x = 1\n", encoding="utf-8")
    assert resolve_base(str(directory)).sha256 != resolve_base(str(tiny_llama)).sha256


def test_embedded_model_is_a_gguf_with_the_hash_of_its_file() -> None:
    source = resolve_base(EMBEDDED)
    assert source.is_gguf
    assert source.name == EMBEDDED
    assert source.sha256 == resolve_base(str(source.path)).sha256


@pytest.mark.parametrize("share", [0.0, 0.001, 0.05, 0.5, 0.99])
def test_truncated_gguf_is_refused(share: float, tiny_gguf: Path, tmp_path: Path) -> None:
    whole = tiny_gguf.read_bytes()
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(whole[: int(len(whole) * share)])
    with pytest.raises(ModelFileError, match="is not a complete GGUF file"):
        open_gguf(cut)


def test_truncated_safetensors_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copied(tiny_llama, tmp_path / "model")
    weights = directory / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelFileError, match=r"model cannot be loaded .*; fetch it again"):
        load_float(resolve_base(str(directory)))


def test_missing_weight_is_an_error_not_a_random_number(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copied(tiny_llama, tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelFileError, match=r"lacks 1 weights.*layers\.1\.mlp\.up_proj\.weight"):
        load_float(resolve_base(str(directory)))


def test_unknown_architecture_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    directory = copied(tiny_llama, tmp_path / "model")
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    config["model_type"] = "unheard-of"
    (directory / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(ModelFileError, match="unheard-of"):
        load_float(resolve_base(str(directory)))


@pytest.mark.parametrize("missing", ["tokenizer.json", "chat_template.jinja"])
def test_missing_tokenizer_parts_are_named(missing: str, tiny_llama: Path, tmp_path: Path) -> None:
    directory = copied(tiny_llama, tmp_path / "model")
    (directory / missing).unlink()
    with pytest.raises(ModelFileError, match=missing.replace(".", r"\.")):
        load_tokenizer(resolve_base(str(directory)))


def test_everything_is_frozen_and_in_evaluation_mode(tiny_llama: Path) -> None:
    model = load_float(resolve_base(str(tiny_llama)))
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_own_quantization_equals_that_of_transformers(untied_qwen: Path) -> None:
    """The one path for GGUF bases gives the very integers and scales of the other."""
    source = resolve_base(str(untied_qwen))
    theirs = load_base(source, load_in_8bit=True, dtype=torch.float32)
    ours = load_float(source)
    quantize_linear_layers(ours)
    names = {n for n, m in ours.named_modules() if type(m).__name__ == "Linear8bitLt"}
    assert len(names) == 2 * 7
    assert names == {n for n, m in theirs.named_modules() if type(m).__name__ == "Linear8bitLt"}
    for name in names:
        mine, other = ours.get_submodule(name), theirs.get_submodule(name)
        assert torch.equal(mine.weight, other.weight)
        assert torch.equal(mine.weight.SCB, other.weight.SCB)
        assert (mine.bias is None) == (other.bias is None)
        assert mine.bias is None or torch.equal(mine.bias, other.bias)


def test_8bit_weights_are_bitsandbytes_row_wise_quantization(tiny_llama: Path) -> None:
    source = resolve_base(str(tiny_llama))
    original, quantized = load_float(source), load_float(source)
    quantize_linear_layers(quantized)
    for name, layer in original.named_modules():
        if not isinstance(layer, nn.Linear) or name == "lm_head":
            continue
        integers, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(layer.weight.half())
        twin = quantized.get_submodule(name)
        assert torch.equal(twin.weight, integers)
        assert torch.equal(twin.weight.SCB, scales)
        step = (scales / 127)[:, None]
        error = (dequantized_weight(twin) - layer.weight).abs()
        assert bool((error <= 0.5 * step + 1e-3 * layer.weight.abs() + 1e-7).all())


def test_output_matrix_and_embeddings_stay_float(untied_qwen: Path) -> None:
    model = load_base(resolve_base(str(untied_qwen)), load_in_8bit=True, dtype=torch.bfloat16)
    assert type(model.get_output_embeddings()) is nn.Linear
    assert model.get_output_embeddings().weight.dtype == torch.bfloat16
    assert model.get_input_embeddings().weight.dtype == torch.bfloat16


def test_8bit_training_kernel_multiplies_by_the_dequantized_weights(tiny_llama: Path) -> None:
    model = load_base(resolve_base(str(tiny_llama)), load_in_8bit=True, dtype=torch.float32)
    layer = next(iter(quantized_layers(model))).train()
    x = torch.randn(1, 9, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), x @ dequantized_weight(layer).T, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("load_in_8bit", [False, True])
def test_gguf_base_loads(tiny_gguf: Path, load_in_8bit: bool) -> None:
    source = resolve_base(str(tiny_gguf))
    model = load_base(source, load_in_8bit=load_in_8bit, dtype=torch.float32)
    assert len(list(quantized_layers(model))) == (14 if load_in_8bit else 0)
    assert bool(model.train()(IDS.clamp(max=250)).logits.isfinite().all())


def test_a_float_layer_dequantizes_to_itself() -> None:
    layer = nn.Linear(16, 8, dtype=torch.bfloat16)
    assert torch.equal(dequantized_weight(layer), layer.weight.float())


def test_hidden_size_not_divisible_by_8_ends_the_fit_with_a_clear_error(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "odd", "llama", hidden=36)
    config = fit_config(tmp_path, base)
    with pytest.raises(ConfigError, match="hidden size is divisible by 8, found 36"):
        fit(config, resume=False, reporter=QUIET)
    assert not config.output_dir.exists()


def test_base_that_has_verdict_tokens_already_is_refused(tiny_gguf: Path, tmp_path: Path) -> None:
    """The shared tiny GGUF is an SO8T export: training on it again would add a second head."""
    config = fit_config(tmp_path, tiny_gguf)
    write_cases(tmp_path / "train.jsonl", [case_dict(i) for i in range(3)])
    with pytest.raises(ConfigError, match=r"already has the tokens <\|so8t_allow\|>"):
        fit(config, resume=False, reporter=QUIET)

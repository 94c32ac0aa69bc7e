"""Installing gates in real (tiny, random) models: PEFT, half dtypes, 8-bit, fold, removal."""

import copy
import logging
from pathlib import Path

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import nn

from so8t_eval.errors import ConfigError
from so8t_train.gate_installation import (
    attention_outputs,
    install_rotation_gates,
    remove_rotation_gates,
    rotation_gates,
)
from so8t_train.rotation_gate import GateRouting, RotationGateBank

# PEFT 0.21 uses the names that transformers 5.0 has and 5.23 renames with a warning.
pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

COMMON = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {"num_key_value_heads": 2}
HEADS = {"head_dim": 16}
FAMILIES = {
    "llama": transformers.LlamaConfig(**COMMON, **GROUPED, attention_bias=True),
    "mistral": transformers.MistralConfig(**COMMON, **GROUPED),
    "qwen2": transformers.Qwen2Config(**COMMON, **GROUPED),
    "qwen3": transformers.Qwen3Config(**COMMON, **GROUPED, **HEADS),
    "phi": transformers.PhiConfig(**COMMON),
    "phi3": transformers.Phi3Config(**COMMON, **GROUPED),
    "gemma2": transformers.Gemma2Config(**COMMON, **GROUPED, **HEADS),
    "gemma3": transformers.Gemma3TextConfig(**COMMON, **GROUPED, **HEADS),
    "gpt_neox": transformers.GPTNeoXConfig(**COMMON),
    "bloom": transformers.BloomConfig(vocab_size=64, hidden_size=64, n_layer=2, n_head=4),
}
IDS = torch.tensor([[5, 9, 33, 2, 7, 60], [8, 8, 1, 41, 3, 12]])


def tiny_model(
    family: str = "llama", dtype: torch.dtype = torch.float32
) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(FAMILIES[family]))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return model.to(dtype).eval()


def with_lora(model: transformers.PreTrainedModel) -> PeftModel:
    torch.manual_seed(1)
    peft = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_alpha=8))
    for name, parameter in peft.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return peft.eval()


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits.float()


def rotate_with_gates(model: nn.Module) -> None:
    install_rotation_gates(model, init_std=1.0, seed=3)


def fold_into(model: nn.Module, rotations: list[torch.Tensor]) -> None:
    for output, rotation in zip(attention_outputs(model), rotations, strict=True):
        projection = output.projection
        G = torch.block_diag(*rotation.double())
        with torch.no_grad():
            projection.weight.copy_(G @ projection.weight.double())
            if projection.bias is not None:
                projection.bias.copy_(G @ projection.bias.double())


@pytest.mark.parametrize("family", FAMILIES)
def test_gated_model_equals_folded_model(family):
    model = tiny_model(family, torch.float64)
    plain = logits(model)
    rotate_with_gates(model)
    gates = rotation_gates(model)
    assert len(gates) == 2
    gated = logits(model)
    rotations = [copy.deepcopy(gate).double().rotation().detach() for gate in gates]
    remove_rotation_gates(model)
    assert torch.equal(logits(model), plain)
    fold_into(model, rotations)
    scale = gated.abs().max()
    # Norms and rotary angles inside the models are float32, whatever the model's dtype.
    torch.testing.assert_close(logits(model) / scale, gated / scale, rtol=0, atol=1e-5)
    assert (gated - plain).abs().max() > 1e-3 * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_runs_and_trains_in_the_dtype_of_the_model(family, dtype):
    model = with_lora(tiny_model(family, dtype))
    gates = install_rotation_gates(model, init_std=0.5)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model.train()
    bank = RotationGateBank(gates)
    bank.begin_step()
    out = model(input_ids=IDS, labels=IDS, use_cache=False)
    assert out.logits.dtype == dtype
    out.loss.backward()
    bank.collect("task")
    bank.finish_step()
    for gate in gates:
        assert gate.safe_generators.dtype == torch.float32
        assert gate.safe_generators.grad is None
        assert gate.command_generators.grad.abs().max() > 0


def test_untrained_gates_change_nothing():
    model = tiny_model()
    before = logits(model)
    gates = install_rotation_gates(model)
    torch.testing.assert_close(logits(model), before, rtol=0, atol=0)
    routing = GateRouting("safety")
    remove_rotation_gates(model)
    for gate in install_rotation_gates(model, routing=routing):
        assert gate not in gates
        assert gate.routing is routing


def test_gate_acts_after_lora_and_bias():
    model = with_lora(tiny_model("llama"))
    (gate, _) = install_rotation_gates(model, init_std=1.0)
    output = attention_outputs(model)[0]
    assert output.name == "model.layers.0.self_attn.o_proj"
    projection = output.projection
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        lora = projection.lora_B["default"](projection.lora_A["default"](x))
        before = projection.base_layer(x) + projection.scaling["default"] * lora
        torch.testing.assert_close(projection(x), gate(before))
        assert (projection.base_layer(x) - before).abs().max() > 0.05


def test_same_result_whether_peft_wraps_before_or_after():
    first = with_lora(tiny_model())
    rotate_with_gates(first)
    second = tiny_model()
    rotate_with_gates(second)
    second = with_lora(second)
    torch.testing.assert_close(logits(second), logits(first), rtol=0, atol=0)


def test_gates_survive_merging_the_adapter():
    model = with_lora(tiny_model())
    rotate_with_gates(model)
    gated = logits(model)
    merged = model.merge_and_unload()
    assert len(rotation_gates(merged)) == 2
    torch.testing.assert_close(logits(merged), gated, rtol=1e-4, atol=1e-5)


def test_peft_files_and_names_are_as_without_gates(tmp_path: Path):
    plain, gated = with_lora(tiny_model()), with_lora(tiny_model())
    names = [name for name, _ in plain.named_modules()]
    rotate_with_gates(gated)
    added = [name for name, _ in gated.named_modules() if name not in names]
    prefix = "base_model.model.model.layers"
    assert added == [f"{prefix}.{layer}.self_attn.rotation_gate" for layer in range(2)]
    files = {}
    for kind, model in (("plain", plain), ("gated", gated)):
        model.save_pretrained(tmp_path / kind)
        files[kind] = load_file(tmp_path / kind / "adapter_model.safetensors")
    assert files["plain"].keys() == files["gated"].keys()
    for name, tensor in files["plain"].items():
        assert torch.equal(tensor, files["gated"][name])
    config = "adapter_config.json"
    assert (tmp_path / "plain" / config).read_text() == (tmp_path / "gated" / config).read_text()
    reloaded = PeftModel.from_pretrained(tiny_model(), tmp_path / "gated").eval()
    assert torch.equal(logits(reloaded), logits(plain))


def test_deep_copy_is_independent():
    model = tiny_model()
    rotate_with_gates(model)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    with torch.no_grad():
        rotation_gates(twin)[0].safe_generators.add_(0.5)
    assert torch.equal(logits(model), before)
    assert not torch.equal(logits(twin), before)
    remove_rotation_gates(twin)
    assert rotation_gates(twin) == []
    assert torch.equal(logits(model), before)


def test_removal_leaves_no_trace():
    model = tiny_model()
    keys, before = list(model.state_dict()), logits(model)
    rotate_with_gates(model)
    remove_rotation_gates(model)
    assert list(model.state_dict()) == keys
    assert torch.equal(logits(model), before)
    remove_rotation_gates(model)
    # Nothing stays behind that would rotate a projection put in later.
    assert torch.equal(logits(with_lora(model)), logits(with_lora(tiny_model())))


def test_gates_move_with_the_model():
    model = tiny_model()
    rotate_with_gates(model)
    model.to("meta")
    assert {p.device.type for gate in rotation_gates(model) for p in gate.parameters()} == {"meta"}


def test_works_with_accelerate_cpu_offload():
    from accelerate import cpu_offload

    model = tiny_model()
    rotate_with_gates(model)
    expected = logits(model)
    remove_rotation_gates(model)
    cpu_offload(model, execution_device=torch.device("cpu"))
    assert attention_outputs(model)[0].projection.weight.device.type == "meta"
    rotate_with_gates(model)
    assert rotation_gates(model)[0].safe_generators.device.type == "cpu"
    assert torch.equal(logits(model), expected)


def test_installing_twice_is_an_error():
    model = tiny_model()
    install_rotation_gates(model)
    with pytest.raises(ConfigError, match="already"):
        install_rotation_gates(model)


def test_hidden_size_not_divisible_by_eight_leaves_the_model_untouched():
    config = transformers.LlamaConfig(**{**COMMON, "hidden_size": 60}, **HEADS)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with pytest.raises(ConfigError, match="divisible by 8, found 60"):
        install_rotation_gates(model)
    assert rotation_gates(model) == []


def test_unsupported_architectures_are_named():
    gpt2 = transformers.GPT2Config(vocab_size=64, n_embd=64, n_layer=2, n_head=4)
    with pytest.raises(ConfigError, match=r"o_proj.*found in h\.0|o_proj.*GPT2Block.*c_proj"):
        install_rotation_gates(transformers.GPT2LMHeadModel(gpt2))
    with pytest.raises(ConfigError, match=r"causal language model, found Linear"):
        install_rotation_gates(nn.Linear(8, 8))


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("tiny_llama")
    tiny_model("llama").save_pretrained(path)
    return path


def test_eight_bit_base_with_lora(saved_model: Path, caplog):
    caplog.set_level(logging.ERROR, logger="bitsandbytes")  # a line per 8-bit product
    base = transformers.AutoModelForCausalLM.from_pretrained(
        saved_model,
        quantization_config=transformers.BitsAndBytesConfig(load_in_8bit=True),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    model = with_lora(base)
    assert type(attention_outputs(model)[0].projection).__module__.startswith("peft")
    plain = logits(model)
    gates = install_rotation_gates(model)
    assert torch.equal(logits(model), plain)
    with torch.no_grad():
        for gate in gates:
            nn.init.normal_(gate.safe_generators, generator=torch.Generator().manual_seed(0))
    assert (logits(model) - plain).abs().max() > 1e-3

    output, seen = attention_outputs(model)[0], []
    handle = gates[0].register_forward_pre_hook(lambda _gate, inputs: seen.append(inputs[0]))
    rotated = output.projection(torch.ones(1, 64, dtype=torch.bfloat16))
    handle.remove()
    G = torch.block_diag(*gates[0].rotation())
    torch.testing.assert_close(rotated, (seen[0].float() @ G.T).bfloat16(), rtol=0.01, atol=0.01)

    model.train()
    bank = RotationGateBank(gates)
    bank.begin_step()
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    bank.collect("safety")
    bank.finish_step()
    for gate in gates:
        assert gate.safe_generators.grad.abs().max() > 0
        assert gate.command_generators.grad is None

"""The fused adapted layer gives the numbers and gradients of bitsandbytes and PEFT."""

from pathlib import Path

import pytest
import torch
from support.tiny_fit import fit_config
from torch import Tensor, nn

from so8t_train import cpu_lora
from so8t_train.base_model import resolve_base
from so8t_train.cpu_lora import fuse_cpu_lora
from so8t_train.packing import PackedSequence, pack
from so8t_train.quantized_layers import use_training_kernels
from so8t_train.safety_model import SafetyModel, build_safety_model

CPU = torch.device("cpu")


def quantized_model(
    tmp_path: Path, base: Path, dtype: torch.dtype, bits: int = 8, dropout: float = 0.0
) -> SafetyModel:
    """A safety model on an 8-bit or 4-bit base whose LoRA does something."""
    config = fit_config(tmp_path, base).model_copy(
        update={
            "load_in_8bit": bits == 8,
            "load_in_4bit": bits == 4,
            "lora_dropout": dropout,
        }
    )
    model, _ = build_safety_model(resolve_base(str(base)), config, dtype)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.train()


def result(model: SafetyModel) -> tuple[Tensor, dict[str, Tensor]]:
    """Hidden states of a pack, and the gradient of every LoRA matrix."""
    items = [PackedSequence((3, 4, 5), tuple(range(6, 6 + n)), n - 1, (7,), 1.0) for n in (4, 9, 6)]
    model.zero_grad()
    states = model.hidden(pack(items, CPU))
    towards = torch.randn(states.shape, generator=torch.Generator().manual_seed(1))
    (states.float() * towards).sum().backward()  # type: ignore[no-untyped-call]
    lora = {n: p.grad for n, p in model.named_parameters() if "lora_" in n and p.grad is not None}
    return states.detach(), {n: g.clone() for n, g in lora.items()}


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)], ids=str
)
def test_numbers_and_gradients_are_those_of_peft(
    tmp_path: Path, tiny_llama: Path, dtype: torch.dtype, tolerance: float, bits: int
) -> None:
    model = quantized_model(tmp_path, tiny_llama, dtype, bits)
    use_training_kernels(model)
    states, gradients = result(model)
    assert fuse_cpu_lora(model, dtype)
    fused_states, fused_gradients = result(model)
    assert fused_gradients.keys() == gradients.keys()
    assert len(gradients) == 2 * 14
    assert _relative(fused_states, states) < tolerance
    for name, gradient in gradients.items():
        assert gradient.abs().max() > 0
        assert fused_gradients[name].dtype == torch.float32
        assert _relative(fused_gradients[name], gradient) < tolerance, name


@pytest.mark.parametrize("bits", [8, 4])
def test_short_memory_changes_no_number(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch, bits: int
) -> None:
    model = quantized_model(tmp_path, tiny_llama, torch.bfloat16, bits)
    fuse_cpu_lora(model, torch.bfloat16)
    states, gradients = result(model)
    monkeypatch.setattr(cpu_lora, "MOST_MEMORY_SHARE", 0.0)
    again = quantized_model(tmp_path, tiny_llama, torch.bfloat16, bits)
    assert not fuse_cpu_lora(again, torch.bfloat16)
    other_states, other_gradients = result(again)
    assert torch.equal(other_states, states)
    assert all(torch.equal(other_gradients[n], g) for n, g in gradients.items())


def test_layers_with_dropout_stay_with_peft(tmp_path: Path, tiny_llama: Path) -> None:
    model = quantized_model(tmp_path, tiny_llama, torch.float32, dropout=0.1)
    fuse_cpu_lora(model, torch.float32)
    assert not [m for m in model.modules() if "forward" in vars(m) and hasattr(m, "lora_A")]


def test_parameters_keep_their_names_and_the_base_learns_nothing(
    tmp_path: Path, tiny_llama: Path
) -> None:
    model = quantized_model(tmp_path, tiny_llama, torch.float32)
    before = [name for name, _ in model.named_parameters()]
    fuse_cpu_lora(model, torch.float32)
    assert [name for name, _ in model.named_parameters()] == before
    result(model)
    frozen = [
        m for m in model.modules() if isinstance(m, nn.Linear) and m.weight.dtype == torch.int8
    ]
    assert frozen
    assert all(layer.weight.grad is None for layer in frozen)


def _relative(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())

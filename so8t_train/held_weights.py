"""Float layers in place of quantized ones, for a model that is judged with and no longer trained."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from so8t_train.quantized_layers import dequantized_weight, quantized_layers


class HeldLora(nn.Module):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ with a float W, LoRA unmerged: what the trained layer computes.

    The update is added in place by the second product, which spares three passes over the output.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor) -> None:
        super().__init__()
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.register_buffer("down_transposed", down.T.contiguous())
        self.register_buffer("up_transposed", up.T.contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) to (…, out); not differentiable."""
        rows = x.flatten(0, -2)
        out = F.linear(rows, self.get_buffer("weight"), self._buffers["bias"])
        update = rows @ self.get_buffer("down_transposed")
        return out.addmm_(update, self.get_buffer("up_transposed")).view(*x.shape[:-1], -1)


def hold_dequantized_weights(model: nn.Module, dtype: torch.dtype) -> None:
    """Replace 8-bit and 4-bit layers by float ones with the very weights their training kernel makes.

    That kernel dequantizes in every pass; once is enough where memory for it is at hand.
    """
    from peft.tuners.lora import LoraLayer

    held = set(quantized_layers(model))
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            lora: Any = child if isinstance(child, LoraLayer) else None
            base = child if lora is None else lora.get_base_layer()
            if base in held:
                setattr(parent, name, _held(base, lora, dtype))


def _held(base: nn.Module, lora: Any, dtype: torch.dtype) -> nn.Module:
    weight, bias = dequantized_weight(base).to(dtype), _bias(base, dtype)
    if lora is None:
        with torch.device("meta"):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            layer.bias = nn.Parameter(bias, requires_grad=False)
        return layer
    with torch.no_grad():
        down, up = lora.lora_A["default"].weight, lora.lora_B["default"].weight
        scaled = up.float() * lora.scaling["default"]
        return HeldLora(weight, bias, down.to(dtype), scaled.to(dtype))


def _bias(layer: nn.Module, dtype: torch.dtype) -> Tensor | None:
    bias = layer.bias
    return bias.detach().to(dtype) if isinstance(bias, Tensor) else None

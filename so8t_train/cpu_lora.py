"""Training on a CPU: an adapted 8-bit or 4-bit layer as one function with a backward pass of its own.

On a CPU bitsandbytes multiplies by dequantized weights and makes them anew in every pass, and PEFT
computes LoRA in float32 over copies of the activations. Here the same product is computed from
weights dequantized once (or, where memory is short, in every pass: the same numbers), with LoRA in
the activations' dtype and its update added in place. Modules and parameters stay PEFT's.
"""

from collections.abc import Callable
from types import MethodType
from typing import Any, Final, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from so8t_train.data_parallel import local_processes
from so8t_train.quantized_layers import (
    dequantized_4bit,
    dequantized_8bit,
    quantized_layers,
    row_maxima,
    weight_count,
)

MOST_MEMORY_SHARE: Final = 0.5
"""Share of free memory that dequantized weights may take."""


class _Frozen(NamedTuple):
    """What a layer does not learn: its weight (out, in), bias, LoRA scale.

    ``make`` dequantizes the weight, rounded to a dtype as in bitsandbytes; ``held`` is what it made
    once, None where it is made in every pass.
    """

    make: Callable[[torch.dtype], Tensor]
    held: Tensor | None
    bias: Tensor | None
    lora_scale: float

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in)."""
        if self.held is not None:
            return self.held if self.held.dtype == dtype else self.held.to(dtype)
        return self.make(dtype)


class _FrozenLinearWithLora(torch.autograd.Function):
    """x Wᵀ + b + s (x Aᵀ) Bᵀ for rows x (n, in); gradients for x, A (r, in) and B (out, r)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, frozen: _Frozen) -> Tensor:
        down_here, up_here = down.to(x.dtype), (up * frozen.lora_scale).to(x.dtype)
        inner = x @ down_here.T
        ctx.save_for_backward(x, inner, down_here, up_here)
        ctx.frozen = frozen
        out = F.linear(x, frozen.weight(x.dtype), frozen.bias)
        return out.addmm_(inner, up_here.T)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor, Tensor, None]:
        x, inner, down, up = ctx.saved_tensors
        frozen: _Frozen = ctx.frozen
        grad_inner = grad @ up
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ frozen.weight(grad.dtype)).addmm_(grad_inner, down)
        grad_down = (grad_inner.T @ x).float()
        grad_up = (grad.T @ inner).float() * frozen.lora_scale
        return grad_x, grad_down, grad_up, None


def fuse_cpu_lora(model: nn.Module, dtype: torch.dtype) -> bool:
    """Compute the adapted quantized layers of ``model`` by the function above, from now on.

    Layers that PEFT computes in another way (dropout, DoRA, several adapters) are left alone.
    Returns:
        Whether the dequantized weights are held; else they are made in every pass.
    """
    layers = [m for m in model.modules() if _fusible(m)]
    numbers = sum(weight_count(base) for m in layers for base in quantized_layers(m))
    fits = fits_in_memory(numbers * dtype.itemsize)
    for layer in layers:
        _fuse(layer, dtype if fits else None)
    return fits


def fits_in_memory(n_bytes: int) -> bool:
    """Whether dequantized weights of this size leave enough of the free memory."""
    return bool(
        n_bytes * local_processes() <= MOST_MEMORY_SHARE * psutil.virtual_memory().available
    )


def _fusible(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or list(module.lora_A) != ["default"]:
        return False
    plain = isinstance(module.lora_dropout["default"], nn.Identity) and not module.lora_variant
    return plain and next(iter(quantized_layers(module)), None) is not None


def _fuse(layer: Any, held_dtype: torch.dtype | None) -> None:
    base = layer.get_base_layer()
    make = _maker(base)
    held = None if held_dtype is None else make(held_dtype)
    frozen = _Frozen(make, held, base.bias, float(layer.scaling["default"]))

    def forward(self: Any, x: Tensor, *_args: object, **_options: object) -> Tensor:
        rows = x.flatten(0, -2)
        down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
        out: Tensor = _FrozenLinearWithLora.apply(rows, down, up, frozen)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], -1)

    layer.forward = MethodType(forward, layer)


def _maker(base: Any) -> Callable[[torch.dtype], Tensor]:
    codes = base.weight.data
    quant_state = getattr(base.weight, "quant_state", None)
    if quant_state is not None:
        return lambda dtype: dequantized_4bit(codes, quant_state).to(dtype)
    row_scale = row_maxima(base).unsqueeze(1).mul(1.0 / 127.0)
    return lambda dtype: dequantized_8bit(codes, row_scale, dtype)

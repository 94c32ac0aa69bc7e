"""Training on a CPU: an adapted 8-bit layer as one function with a backward pass of its own.

On a CPU bitsandbytes multiplies by dequantized weights and makes them anew in every pass, and PEFT
computes LoRA in float32 over copies of the activations. Here the same product is computed from
weights dequantized once (or, where memory is short, in every pass: the same numbers), with LoRA in
the activations' dtype and its update added in place. Modules and parameters stay PEFT's.
"""

from types import MethodType
from typing import Any, Final, NamedTuple

import psutil
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from so8t_train.data_parallel import local_processes
from so8t_train.safety_model import linear_8bit_layers

MOST_MEMORY_SHARE: Final = 0.5
"""Share of free memory that dequantized weights may take."""


class _Frozen(NamedTuple):
    """What a layer does not learn: weight codes (out, in), row scales (out, 1), bias, LoRA scale.

    ``held`` is the dequantized weight, None where it is made in every pass.
    """

    codes: Tensor
    row_scale: Tensor
    held: Tensor | None
    bias: Tensor | None
    lora_scale: float

    def weight(self, dtype: torch.dtype) -> Tensor:
        """The dequantized weight (out, in), rounded to ``dtype`` as in bitsandbytes."""
        if self.held is not None:
            return self.held if self.held.dtype == dtype else self.held.to(dtype)
        return dequantized(self.codes, self.row_scale, dtype)


def dequantized(codes: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight (out, in) of int8 ``codes`` and float32 ``row_scale`` (out, 1)."""
    return codes.to(dtype).mul_(row_scale)


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
    """Compute the adapted 8-bit layers of ``model`` by the function above, from now on.

    Layers that PEFT computes in another way (dropout, DoRA, several adapters) are left alone.
    Returns:
        Whether the dequantized weights are held; else they are made in every pass.
    """
    layers = [m for m in model.modules() if _fusible(m)]
    numbers = sum(p.numel() for m in layers for p in linear_weights(m))
    fits = fits_in_memory(numbers * dtype.itemsize)
    for layer in layers:
        _fuse(layer, dtype if fits else None)
    return fits


def fits_in_memory(n_bytes: int) -> bool:
    """Whether dequantized weights of this size leave enough of the free memory."""
    return bool(
        n_bytes * local_processes() <= MOST_MEMORY_SHARE * psutil.virtual_memory().available
    )


def linear_weights(module: nn.Module) -> list[Tensor]:
    """Weights of the 8-bit layers in ``module``."""
    return [layer.weight for layer in linear_8bit_layers(module)]  # type: ignore[misc]


def _fusible(module: nn.Module) -> bool:
    from peft.tuners.lora import LoraLayer

    if not isinstance(module, LoraLayer) or list(module.lora_A) != ["default"]:
        return False
    plain = isinstance(module.lora_dropout["default"], nn.Identity) and not module.lora_variant
    return plain and next(iter(linear_8bit_layers(module)), None) is not None


def _fuse(layer: Any, held_dtype: torch.dtype | None) -> None:
    base = layer.get_base_layer()
    codes = base.weight.data
    scale = base.weight.SCB if base.state.SCB is None else base.state.SCB
    row_scale = scale.detach().float().unsqueeze(1).mul(1.0 / 127.0)
    held = None if held_dtype is None else dequantized(codes, row_scale, held_dtype)
    frozen = _Frozen(codes, row_scale, held, base.bias, float(layer.scaling["default"]))

    def forward(self: Any, x: Tensor, *_args: object, **_options: object) -> Tensor:
        rows = x.flatten(0, -2)
        down, up = self.lora_A["default"].weight, self.lora_B["default"].weight
        out: Tensor = _FrozenLinearWithLora.apply(rows, down, up, frozen)  # type: ignore[no-untyped-call]
        return out.view(*x.shape[:-1], -1)

    layer.forward = MethodType(forward, layer)

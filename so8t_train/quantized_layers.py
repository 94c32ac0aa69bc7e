"""The base's linear layers in 8-bit (LLM.int8) or 4-bit (QLoRA): made, found, dequantized.

Source: Dettmers et al., "LLM.int8()", 2022, and "QLoRA: Efficient Finetuning of Quantized LLMs",
2023, as bitsandbytes implements them.
"""

from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Final, cast

import torch
from torch import Tensor, nn

from so8t_eval.errors import ConfigError, ModelFileError
from so8t_train.config import FourBit

_KINDS: Final = ("Linear8bitLt", "Linear4bit")
_PROBE_WIDTH: Final = 64


def quantized_layers(model: nn.Module) -> Iterable[nn.Module]:
    """Every bitsandbytes 8-bit or 4-bit layer below ``model``; PEFT's, of the same names, are not."""
    return (
        m
        for m in model.modules()
        if type(m).__name__ in _KINDS and type(m).__module__.startswith("bitsandbytes")
    )


def weight_count(layer: Any) -> int:
    """Numbers in a layer's weight; two of them share a byte where it is 4-bit."""
    return int(layer.in_features * layer.out_features)


def use_training_kernels(model: nn.Module) -> None:
    """Make quantized layers multiply by their dequantized weights, as they do in training on CPU.

    bitsandbytes picks its CPU kernels by ``layer.training``: the 8-bit inference kernel quantizes
    activations too, which moves logits by several per cent on the same weights; the 4-bit one
    rearranges the weights for good, after which no gradient passes.
    """
    for layer in quantized_layers(model):
        layer.training = True


def quantize_linear_layers(
    model: nn.Module, four_bit: FourBit | None = None, device: torch.device | None = None
) -> None:
    """Replace every linear layer but the output matrix by its quantized twin, in place.

    8-bit unless ``four_bit`` says how. The same quantization that transformers applies while
    loading; needed because transformers cannot quantize a model that it read from GGUF. The twins
    are made on ``device`` (default: where the layer is): moving the whole model afterwards would
    leave their scales behind.
    """
    output = model.get_output_embeddings()  # type: ignore[operator]
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is not nn.Linear or child is output:
                continue
            twin = _eight_bit(child) if four_bit is None else _four_bit(child, four_bit)
            if child.bias is not None:
                twin.bias = nn.Parameter(child.bias.data, requires_grad=False)
            setattr(parent, name, twin.to(device or child.weight.device))
    # What PEFT looks for to choose its layers.
    setattr(model, f"is_loaded_in_{8 if four_bit is None else 4}bit", True)


def _eight_bit(layer: nn.Linear) -> nn.Module:
    import bitsandbytes as bnb

    with torch.device("meta"):
        twin: nn.Module = bnb.nn.Linear8bitLt(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            has_fp16_weights=False,
            threshold=6.0,
        )
    twin.weight = bnb.nn.Int8Params(layer.weight.data, requires_grad=False, has_fp16_weights=False)
    return twin


def _four_bit(layer: nn.Linear, four_bit: FourBit) -> nn.Module:
    import bitsandbytes as bnb

    with torch.device("meta"):
        twin: nn.Module = bnb.nn.Linear4bit(
            layer.in_features,
            layer.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.weight.dtype,
            compress_statistics=four_bit.double_quant,
            quant_type=four_bit.quant_type,
        )
    twin.weight = bnb.nn.Params4bit(
        layer.weight.data,
        requires_grad=False,
        compress_statistics=four_bit.double_quant,
        quant_type=four_bit.quant_type,
    )
    return twin


def require_four_bit_layers(device: torch.device) -> None:
    """Run a small 4-bit layer forward and backward on ``device``, as training will.

    Raises:
        ConfigError: this platform's bitsandbytes cannot.
    """
    try:
        layer = _four_bit(nn.Linear(_PROBE_WIDTH, _PROBE_WIDTH, bias=False), FourBit()).to(device)
        inputs = torch.ones(1, _PROBE_WIDTH, device=device, requires_grad=True)
        layer.train()(inputs).sum().backward()
    except Exception as error:  # a missing class, library or kernel: each raises its own
        raise ConfigError(
            f"load_in_4bit: expected 4-bit layers that train on {device.type}, found that "
            f"bitsandbytes {_bitsandbytes_version()} has none here "
            f"({type(error).__name__}: {error}); run so8t-train doctor to see what this machine "
            "can do, or set load_in_4bit: false"
        ) from error


def _bitsandbytes_version() -> str:
    try:
        return version("bitsandbytes")
    except PackageNotFoundError:
        return "(not installed)"


def dequantized_weight(layer: nn.Module) -> Tensor:
    """Float32 weight (out, in) of a linear layer, dequantized if it is 8-bit or 4-bit."""
    weight = cast(Any, layer.weight)
    quant_state = getattr(weight, "quant_state", None)
    if quant_state is not None:
        return dequantized_4bit(weight.data, quant_state).float()
    if weight.dtype != torch.int8:
        return cast(Tensor, weight.detach().float())
    codes = cast(Tensor, weight.detach().float())
    return codes * (row_maxima(layer) / 127.0).unsqueeze(1)


def row_maxima(layer: Any) -> Tensor:
    """Float32 (out,): what code 127 stands for in each row of an 8-bit layer."""
    scale: Tensor | None = getattr(layer.weight, "SCB", None)
    if scale is None:  # the first forward pass moves it
        scale = layer.state.SCB if hasattr(layer, "state") else None
    if scale is None:
        raise ModelFileError("an 8-bit layer has lost its row scales (SCB); load the base again")
    return scale.detach().float()


def dequantized_8bit(codes: Tensor, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Weight (out, in) of int8 ``codes`` and float32 ``row_scale`` (out, 1)."""
    return codes.to(dtype).mul_(row_scale)


def dequantized_4bit(codes: Tensor, quant_state: Any) -> Tensor:
    """Weight (out, in) of packed ``codes``, in the dtype it was quantized from."""
    import bitsandbytes as bnb

    weight: Tensor = bnb.functional.dequantize_4bit(codes, quant_state)
    return weight


def dequant8(weight: Tensor) -> Tensor:
    """``weight`` (out, in) after LLM.int8 row-wise quantization and back, float32.

    The same kernel and the same rounding to float16 before it as in ``bitsandbytes.Linear8bitLt``.
    """
    import bitsandbytes as bnb

    codes, row_maxima, _ = bnb.functional.int8_vectorwise_quant(weight.half().contiguous())
    scaled: Tensor = codes.float() * (row_maxima.float() / 127.0).unsqueeze(1)
    return scaled


def dequant4(weight: Tensor, four_bit: FourBit) -> Tensor:
    """``weight`` (out, in), the whole one, after 4-bit quantization and back, float32.

    Blocks of 64 run on over row ends, and double quantization takes the mean scale of all blocks:
    rows by themselves would become other numbers.
    """
    import bitsandbytes as bnb

    codes, quant_state = bnb.functional.quantize_4bit(
        weight.float().contiguous(),
        compress_statistics=four_bit.double_quant,
        quant_type=four_bit.quant_type,
    )
    return dequantized_4bit(codes, quant_state)

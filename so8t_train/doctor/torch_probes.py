"""Probes of PyTorch: devices, bfloat16 speed, and quantized layers run forward and backward.

``torch`` and ``bitsandbytes`` are imported inside the probes, which run in a child process.
"""

import time
from functools import partial
from typing import TYPE_CHECKING, Final, Literal

from so8t_train.doctor.finding import Answer, Probe

if TYPE_CHECKING:
    import torch

Bits = Literal[8, 4]
_WIDTH: Final = 64
_MATRIX: Final = 512
_LARGEST_ERROR: Final = {8: 0.05, 4: 0.25}
"""Relative error of output and gradient that quantizing normal weights explains."""


def _torch() -> Answer:
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return Answer(
        "ok", f"{torch.__version__}, {torch.get_num_threads()} threads, {capability} kernels"
    )


def _cuda() -> Answer:
    import torch

    if not torch.cuda.is_available():
        built = "CUDA build, no usable device" if torch.version.cuda else "CPU build"
        return Answer("absent", f"none ({built})")
    free, total = torch.cuda.mem_get_info()
    major, minor = torch.cuda.get_device_capability()
    return Answer(
        "ok",
        f"{torch.cuda.get_device_name()}, {total / 2**30:.1f} GiB ({free / 2**30:.1f} free), "
        f"compute capability {major}.{minor}",
    )


def _bfloat16(device: str) -> Answer:
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return Answer("absent", "no CUDA device")
    seconds = {dtype: _matmul_s(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    speedup = seconds[torch.float32] / seconds[torch.bfloat16]
    rate = 2 * _MATRIX**3 / seconds[torch.bfloat16] / 1e9
    advice = "compute_dtype: float32 is faster here" if speedup < 1 else ""
    return Answer("ok", f"{speedup:.1f} times float32's speed ({rate:.0f} GFLOP/s)", advice)


def _matmul_s(device: str, dtype: "torch.dtype") -> float:
    """Seconds of one square matrix product: the fastest of five after a warm-up."""
    import torch

    matrix = torch.randn(_MATRIX, _MATRIX, device=device).to(dtype)
    times = []
    for _ in range(6):
        started = time.perf_counter()
        product = matrix @ matrix
        product[0, 0].item()  # waits for an asynchronous device
        times.append(time.perf_counter() - started)
    return max(min(times[1:]), 1e-9)


def _quantized(bits: Bits, device: str) -> Answer:
    """Run a quantized layer forward and backward and compare it with the float layer."""
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        return Answer("absent", "no CUDA device")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_WIDTH, _WIDTH, generator=generator)
    inputs = torch.randn(8, _WIDTH, generator=generator).to(device).requires_grad_(True)
    layer = _layer(bits, weight, device)
    outputs = layer.train()(inputs)
    (gradient,) = torch.autograd.grad(outputs.square().sum(), inputs)
    exact = inputs.detach() @ weight.to(device).T
    exact_gradient = 2 * exact @ weight.to(device)
    error = max(_distance(outputs, exact), _distance(gradient, exact_gradient))
    if not error <= _LARGEST_ERROR[bits]:
        return Answer(
            "failed",
            f"output or gradient is off by {error:.0%} (expected under {_LARGEST_ERROR[bits]:.0%})",
            f"install another bitsandbytes version, or set load_in_{bits}bit: false",
        )
    return Answer("ok", f"forward and backward run, {error:.1%} from float")


def _layer(bits: Bits, weight: "torch.Tensor", device: str) -> "torch.nn.Module":
    import bitsandbytes as bnb
    import torch

    layer: torch.nn.Module
    if bits == 8:
        layer = bnb.nn.Linear8bitLt(_WIDTH, _WIDTH, bias=False, has_fp16_weights=False)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    else:
        layer = bnb.nn.Linear4bit(
            _WIDTH, _WIDTH, bias=False, compute_dtype=torch.float32, quant_type="nf4"
        )
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
    return layer.to(device)


def _distance(found: "torch.Tensor", exact: "torch.Tensor") -> float:
    return float((found.detach() - exact).norm() / exact.norm())


def _training_libraries() -> Answer:
    import accelerate
    import peft
    import transformers

    if not callable(transformers.AutoModelForCausalLM.from_pretrained):
        return Answer("failed", "transformers has no causal language models", "reinstall it")
    return Answer(
        "ok",
        f"transformers {transformers.__version__}, peft {peft.__version__}, "
        f"accelerate {accelerate.__version__} import",
    )


_EIGHT_BIT: Final = 'pip install "bitsandbytes>=0.50", or set load_in_8bit: false'
_FOUR_BIT: Final = 'pip install "bitsandbytes>=0.50", or leave load_in_4bit out'
PROBES: Final = (
    Probe("PyTorch", _torch, "reinstall torch for this platform"),
    Probe("CUDA device", _cuda, "reinstall torch for this platform and driver"),
    Probe("bfloat16 on cpu", partial(_bfloat16, "cpu"), "set compute_dtype: float32"),
    Probe("bfloat16 on cuda", partial(_bfloat16, "cuda"), "set compute_dtype: float16"),
    Probe("8-bit layers on cpu", partial(_quantized, 8, "cpu"), _EIGHT_BIT),
    Probe("4-bit layers on cpu", partial(_quantized, 4, "cpu"), _FOUR_BIT),
    Probe("8-bit layers on cuda", partial(_quantized, 8, "cuda"), _EIGHT_BIT),
    Probe("4-bit layers on cuda", partial(_quantized, 4, "cuda"), _FOUR_BIT),
    Probe("Training libraries", _training_libraries, "pip install so8t"),
)

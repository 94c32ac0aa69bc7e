"""The activations' dtype of a fit, and whether this processor multiplies it or only emulates it."""

import torch

from so8t_eval.errors import ConfigError
from so8t_train.config import FitConfig

EMULATED = (
    "this processor only emulates bfloat16: a step of the reference fit took 20 times as long as in "
    "float32 on such a one. Set compute_dtype: auto"
)


def compute_dtype(config: FitConfig) -> torch.dtype:
    """The activations' dtype: as configured, or bfloat16 where the processor multiplies it.

    Raises:
        ConfigError: float16, in which small gradients become 0 unless the loss is scaled.
    """
    if config.compute_dtype == "float16":
        raise ConfigError(
            "compute_dtype: expected auto, bfloat16 or float32, found float16; small gradients "
            "underflow in it, and the loss is not scaled here: choose bfloat16 or float32"
        )
    if config.compute_dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.compute_dtype)
        return dtype
    if torch.cuda.is_available() and config.device_map != "cpu":
        capable = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capable = cpu_multiplies_bfloat16()
    return torch.bfloat16 if capable else torch.float32


def cpu_multiplies_bfloat16() -> bool:
    """Whether oneDNN has bfloat16 kernels for this processor that are not emulated."""
    # The name oneDNN gives the fastest bfloat16 kernels it found; absent: emulated and slow.
    return bool(getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)())


def is_emulated(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether training in ``dtype`` on ``device`` would be far slower than in float32."""
    return dtype is torch.bfloat16 and device.type == "cpu" and not cpu_multiplies_bfloat16()

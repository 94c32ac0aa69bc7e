"""Judge with a run directory as trained: 8-bit, 4-bit or float base, live LoRA, live rotation gates."""

from pathlib import Path

import torch

from so8t_eval.backends.torch_backend import TorchBackend
from so8t_eval.backends.torch_scoring import DecoderParts
from so8t_eval.file_hash import file_sha256
from so8t_eval.protocol import DEFAULT_MAX_PROMPT_TOKENS
from so8t_train.config import FitConfig
from so8t_train.cpu_lora import fits_in_memory
from so8t_train.held_weights import hold_dequantized_weights
from so8t_train.quantized_layers import quantized_layers, use_training_kernels, weight_count
from so8t_train.run_dir import MANIFEST, load_run
from so8t_train.safety_model import SafetyModel


def open_run_dir(
    path: Path,
    *,
    threads: int | None = None,
    batch_tokens: int | None = None,
    max_prompt_tokens: int = DEFAULT_MAX_PROMPT_TOKENS,
    dtype: str | None = None,
) -> TorchBackend:
    """Load the live model of a run, nothing merged; ``dtype`` (default float32) computes.

    On a CPU quantized layers multiply by their dequantized weights, as they did in training; these are
    kept where memory allows, else made anew in every pass: the same numbers, slower.

    Raises:
        ModelFileError: an incomplete or altered run, another base, or another protocol.
    """
    if threads is not None:
        torch.set_num_threads(threads)  # loading computes too
    run = load_run(path, dtype=torch.float32 if dtype is None else getattr(torch, dtype))
    model = run.model
    use_training_kernels(model)
    if model.bank is not None:
        model.bank.begin_eval()
    return TorchBackend(
        DecoderParts(
            decoder=model.base.get_decoder(),
            embed=model.embed,
            verdict_logits=model.verdict_logits,
            vocabulary_logits=model.vocabulary_logits,
            device=model.device,
        ),
        run.tokenizer,
        config=model.config,
        verdict_ids=model.verdict_ids,
        model=path.resolve().name,
        # The manifest holds the hash of every other part, of the base, and the temperature.
        model_sha256=file_sha256(path / MANIFEST),
        operating_points={
            name: point.allow_bias for name, point in run.manifest.operating_points.items()
        },
        settings={
            "dtype": str(model.dtype).removeprefix("torch."),
            "weights": _settle_weights(model, run.manifest.config),
            "rotation_gates": model.bank is not None,
        },
        threads=threads,
        batch_tokens=batch_tokens,
        max_prompt_tokens=max_prompt_tokens,
    )


def _settle_weights(model: SafetyModel, config: FitConfig) -> str:
    """Keep dequantized weights if they fit in memory; say what the base's weights are."""
    layers = list(quantized_layers(model))
    if not layers:
        return "float base"
    base = f"{config.precision} base"
    if model.device.type != "cpu":
        return f"{base}, bitsandbytes kernels"
    numbers = sum(map(weight_count, layers))
    if not fits_in_memory(model.dtype.itemsize * numbers):
        return f"{base}, dequantized in every pass"
    hold_dequantized_weights(model, model.dtype)
    return f"{base}, dequantized once"

"""What a fit will do, read off its configuration: how many steps, how fast, which parameters."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from so8t_train.config import FitConfig
from so8t_train.safety_model import SafetyModel
from so8t_train.training_data import TrainingExample


def schedule(step: int, total: int, warmup_ratio: float) -> float:
    """Learning-rate factor: linear warm-up, then cosine to zero."""
    warmup = max(1, round(total * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def total_steps(n_examples: int, config: FitConfig) -> int:
    """Optimizer steps of the whole fit."""
    per_epoch = math.ceil(n_examples / config.cases_per_step)
    steps = max(1, round(per_epoch * config.num_epochs))
    return steps if config.max_steps is None else min(steps, config.max_steps)


def shaping_settings(config: FitConfig) -> dict[str, Any]:
    """The settings that shape the weights, as JSON values."""
    free = {
        "output_dir",
        "base_model",
        "init_from",
        "threads",
        "train_file",
        "dev_file",
        "replay_file",
        "replay_cases",
        "eval_every_steps",
        "eval_max_cases",
        "max_loss_ratio",
    }
    free |= {"save_total_limit", "offload_folder", "adapter_dtype", "merge_base"}
    if not config.load_in_4bit:  # they shape nothing, and older checkpoints do not know them
        free |= {"load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}
    return config.model_dump(mode="json", exclude=free)


def training_hash(config: FitConfig, start_sha256: str, examples: Sequence[TrainingExample]) -> str:
    """SHA-256 over everything that shapes the weights; paths and logging intervals do not.

    ``start_sha256`` names what is trained: the base model, or the run that the fit starts from.
    """
    digest = hashlib.sha256(
        json.dumps([shaping_settings(config), start_sha256], sort_keys=True).encode()
    )
    for example in examples:
        digest.update(repr(example).encode())
    return digest.hexdigest()


def what_differs(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    """The settings that differ, with their values; else what else a checkpoint belongs to."""
    changed = [
        f"{key} ({then.get(key)}, now {now.get(key)})"
        for key in sorted({*then, *now})
        if then and then.get(key) != now.get(key)
    ]
    if changed:
        return ", ".join(changed)
    return (
        "configuration, base model or training set (or by an SO8T version that weighs it otherwise)"
        if not then
        else "base model or training set (or by an SO8T version that reads them otherwise)"
    )


def trainable(model: SafetyModel, config: FitConfig) -> dict[nn.Parameter, str]:
    """Parameters to learn with their checkpoint names, in a stable order."""
    frozen_safe = config.freeze == "safe"
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name or name.endswith("command_generators"):
            learn = True
        elif name.endswith("safe_generators") or name.startswith("verdict_"):
            learn = not frozen_safe
        else:
            learn = False
        parameter.requires_grad_(learn)
        if learn:
            names[parameter] = name
    return names


def parameter_groups(names: dict[nn.Parameter, str], config: FitConfig) -> list[dict[str, Any]]:
    """Optimizer groups: LoRA and R_cmd, then R_safe and the verdict rows, if those learn."""
    safety = [
        p for p, n in names.items() if n.endswith("safe_generators") or n.startswith("verdict_")
    ]
    task = [p for p in names if all(p is not s for s in safety)]
    groups = [{"params": task, "lr": 0.0, "peak_lr": config.learning_rate}]
    if safety:
        groups.append({"params": safety, "lr": 0.0, "peak_lr": config.safety_learning_rate})
    return groups


def pet_phases(config: FitConfig) -> list[tuple[float, float]]:
    """Start (share of training) and temporal weight of each PET phase."""
    starts = (0.0, *config.pet_phase_starts)
    return list(zip(starts, config.pet_phase_weights, strict=True))

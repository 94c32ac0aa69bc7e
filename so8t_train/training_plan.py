"""What a fit will do, read off its configuration: how many steps, how fast, which parameters."""

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from torch import nn

from so8t_train.category_head import CategoryHead
from so8t_train.config import FitConfig
from so8t_train.safety_model import SafetyModel
from so8t_train.training_data import TrainingExample

HEAD_RATE: Final = 5.0
"""Learning rate of the category head in safety learning rates: it starts at zero, not near its end."""
_HEAD: Final = "category_head."


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
    # What shapes nothing where it is off, and what older checkpoints do not know.
    if not config.load_in_4bit:
        free |= {"load_in_4bit", "bnb_4bit_quant_type", "bnb_4bit_use_double_quant"}
    if not config.category_loss_weight:
        free |= {"category_loss_weight"}
    return config.model_dump(mode="json", exclude=free)


def training_hash(config: FitConfig, start_sha256: str, examples: Sequence[TrainingExample]) -> str:
    """SHA-256 over everything that shapes the weights; paths and logging intervals do not.

    ``start_sha256`` names what is trained: the base model, or the run that the fit starts from.
    """
    digest = hashlib.sha256(
        json.dumps([shaping_settings(config), start_sha256], sort_keys=True).encode()
    )
    for example in examples:
        read = [example.id, example.verdict, example.prompt, example.reply]
        if config.category_loss_weight:
            read.append(example.category)
        digest.update(repr(read).encode())
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


def category_head(
    model: SafetyModel, config: FitConfig, examples: Sequence[TrainingExample]
) -> CategoryHead | None:
    """A fresh head for the categories of the training cases; None where none is asked for."""
    if not config.category_loss_weight:
        return None
    hidden_size = model.verdict_rows.shape[1]
    return CategoryHead(hidden_size, [e.category for e in examples], model.device)


def trainable(
    model: SafetyModel, config: FitConfig, head: CategoryHead | None = None
) -> dict[nn.Parameter, str]:
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
    if head is not None:
        names |= {parameter: f"{_HEAD}{name}" for name, parameter in head.named_parameters()}
    return names


def parameter_groups(names: dict[nn.Parameter, str], config: FitConfig) -> list[dict[str, Any]]:
    """Optimizer groups: LoRA and R_cmd, R_safe and the verdict rows, the category head.

    A group whose parameters do not learn is left out.
    """
    task: list[nn.Parameter] = []
    safety: list[nn.Parameter] = []
    head: list[nn.Parameter] = []
    for parameter, name in names.items():
        if name.startswith(_HEAD):
            head.append(parameter)
        elif name.endswith("safe_generators") or name.startswith("verdict_"):
            safety.append(parameter)
        else:
            task.append(parameter)
    rates = (
        (task, config.learning_rate),
        (safety, config.safety_learning_rate),
        (head, HEAD_RATE * config.safety_learning_rate),
    )
    return [{"params": group, "lr": 0.0, "peak_lr": rate} for group, rate in rates if group]


def pet_phases(config: FitConfig) -> list[tuple[float, float]]:
    """Start (share of training) and temporal weight of each PET phase."""
    starts = (0.0, *config.pet_phase_starts)
    return list(zip(starts, config.pet_phase_weights, strict=True))

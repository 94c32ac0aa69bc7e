"""What the training loop tells its caller about each optimizer step, and how."""

from collections.abc import Callable
from typing import NamedTuple

from so8t_train.dev_evaluation import DevResult


class StepReport(NamedTuple):
    """What one optimizer step measured; a line of ``train_log.jsonl`` and the progress bar."""

    step: int
    total_steps: int
    epoch: float
    loss: float
    safety_loss: float
    category_loss: float | None
    """None without a category head."""
    task_loss: float | None
    pet_temporal: float
    pet_inertia: float
    verdict_accuracy: float
    grad_norm: float
    learning_rate: float
    commutator: float
    tokens: int
    step_s: float
    dev: DevResult | None


class TrainingHooks(NamedTuple):
    """How the loop talks to its caller."""

    on_step: Callable[[StepReport], None]
    stop_requested: Callable[[], bool]

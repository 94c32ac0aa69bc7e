"""Training that has gone wrong numerically: what counts as that, and the error that says so."""

import math
from collections.abc import Iterable, Sequence
from typing import Final

import torch
from torch import Tensor

from so8t_eval.errors import BackendError
from so8t_train.config import FitConfig
from so8t_train.training_data import TrainingExample

_CASES_SHOWN: Final = 64


class DivergedError(BackendError):
    """A loss, gradient or weight is not finite, or the loss has exploded; nothing of it is saved."""


def diverged(what: str, step: int, cases: Sequence[TrainingExample]) -> DivergedError:
    """The error for ``what`` ("the gradient is not finite") at ``step``, with its cases named."""
    shown = ", ".join(example.id for example in cases[:_CASES_SHOWN])
    more = len(cases) - _CASES_SHOWN
    return DivergedError(
        f"{what} at step {step} on cases {shown}{f' and {more} more' if more > 0 else ''}; "
        "good checkpoints before it are kept. Look at these cases, set compute_dtype: float32 or a "
        "lower learning_rate, and start again in another output_dir"
    )


class LossGuard:
    """Tells an exploded loss: more than ``max_loss_ratio`` times an untrained model's.

    That is the first step's loss, or guessing (ln of the vocabulary, nats, for each weighted loss)
    where the first is lower, as when a run is continued.
    """

    def __init__(self, config: FitConfig, vocabulary: int) -> None:
        self.first_loss: float | None = None
        self._ratio = config.max_loss_ratio
        safety = config.safety_loss_weight * (1 + config.category_loss_weight)
        weights = safety + config.task_loss_weight
        self._guessing = weights * math.log(vocabulary)

    def check(self, loss: float) -> str | None:
        """What is wrong with a step's ``loss``; None if nothing is. Notes the first one."""
        if self.first_loss is None:
            self.first_loss = loss
        untrained = max(self.first_loss, self._guessing)
        if loss <= self._ratio * untrained:
            return None
        return (
            f"the loss has exploded to {loss:.4g}, more than max_loss_ratio={self._ratio:g} times an "
            f"untrained model's {untrained:.4g},"
        )


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether no value is NaN or infinite."""
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors)

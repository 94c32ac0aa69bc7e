"""The safety, task and PET losses of one packed forward pass."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from so8t_train.category_head import CategoryHead
from so8t_train.packing import Pack
from so8t_train.pet import temporal_penalty
from so8t_train.rotation_gate import captured_outputs
from so8t_train.safety_model import SafetyModel


class SafetyLoss(NamedTuple):
    """Sums over the pack, so that micro-batches of a step add up to the step's mean."""

    cross_entropy_sum: Tensor
    """Weighted verdict cross-entropy over the full vocabulary, scalar."""
    temporal_mean: Tensor
    """PET temporal term, mean over gated layers, scalar; 0 without gates or weight."""
    category_sum: Tensor
    """Weighted cross-entropy of the cases' categories, scalar; 0 without a head."""
    n_correct: int
    """Cases whose most probable verdict is the label."""


def safety_loss(
    model: SafetyModel,
    packed: Pack,
    *,
    label_smoothing: float,
    with_temporal: bool,
    head: CategoryHead | None = None,
    categories: Sequence[str] = (),
) -> SafetyLoss:
    """Forward the prompts of a pack and compare the verdict position with the labels.

    ``categories`` are those of the pack's cases in order; they are learned if there is a ``head``.
    """
    gates = model.gates if with_temporal else []
    with captured_outputs(gates) as gated:
        states = model.hidden(packed)[0, packed.supervised]
    logits = model.vocabulary_logits(states)
    losses = smoothed_cross_entropy(logits, packed.targets, model.verdict_ids, label_smoothing)
    temporal = torch.zeros((), device=logits.device)
    if gated:
        terms = [temporal_penalty(y, packed.segments.to(y.device)) for y in gated]
        temporal = torch.stack([term.to(logits.device) for term in terms]).mean()
    category_sum = torch.zeros((), device=logits.device)
    if head is not None:
        category_sum = (head.cross_entropy(states, categories) * packed.weights).sum()
    three = logits[:, list(model.verdict_ids)].detach()
    correct = three.argmax(dim=-1) == packed.targets - model.verdict_ids[0]
    verdict_sum = (losses * packed.weights).sum()
    return SafetyLoss(verdict_sum, temporal, category_sum, int(correct.sum()))


def task_loss(model: SafetyModel, packed: Pack) -> Tensor:
    """Sum of the cross-entropy over the reply tokens of a pack; verdict rows get no gradient."""
    states = model.hidden(packed, rows_learn=False)
    logits = model.vocabulary_logits(states[0, packed.supervised], rows_learn=False)
    return F.cross_entropy(logits, packed.targets, reduction="sum")


def smoothed_cross_entropy(
    logits: Tensor, targets: Tensor, verdict_ids: Sequence[int], smoothing: float
) -> Tensor:
    """Cross-entropy (n,) against targets of which a share is spread over the three verdicts."""
    log_probabilities = F.log_softmax(logits, dim=-1)
    label = -log_probabilities.gather(1, targets[:, None])[:, 0]
    if not smoothing:
        return label
    spread = -log_probabilities[:, list(verdict_ids)].mean(dim=-1)
    return (1 - smoothing) * label + smoothing * spread

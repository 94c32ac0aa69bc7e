"""Verdicts of the live model on dev examples, and the temperature that calibrates them."""

from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax

from so8t_train.packing import pack
from so8t_train.safety_model import SafetyModel
from so8t_train.training_data import TrainingExample

TEMPERATURES: Final = (0.25, 10.0)
"""Between which a temperature is fitted."""
_TOKENS_PER_FORWARD: Final = 1024


class DevResult(NamedTuple):
    """Accuracy and the three rates that matter, on ``n`` dev cases; None where undefined."""

    n: int
    accuracy: float
    cross_entropy: float
    refuse_recall: float | None
    unsafe_allow_rate: float | None
    over_refusal_rate: float | None


def dev_logits(model: SafetyModel, examples: Sequence[TrainingExample]) -> np.ndarray:
    """Verdict logits (n, 3) float64 in severity order, in the order of ``examples``."""
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].prompt.own))
    logits = np.zeros((len(examples), 3))
    if model.bank is not None:
        model.bank.begin_eval()
    try:
        with torch.no_grad():
            for indices in _batches(order, examples):
                packed = pack([examples[i].prompt for i in indices], model.device)
                states = model.hidden(packed)
                three = model.verdict_logits(states[0, packed.supervised])
                logits[indices] = three.double().cpu().numpy()
    finally:
        if model.bank is not None:
            model.bank.end()
    return logits


def evaluate_dev(model: SafetyModel, examples: Sequence[TrainingExample]) -> DevResult:
    """Run the model on dev examples and summarize."""
    return summarize(dev_logits(model, examples), labels_of(examples))


def labels_of(examples: Sequence[TrainingExample]) -> np.ndarray:
    """Severity (n,) of every example's label."""
    return np.array([example.verdict.severity for example in examples])


def summarize(logits: np.ndarray, labels: np.ndarray) -> DevResult:
    """Rates of ``logits`` (n, 3) against ``labels`` (n,)."""
    predicted = logits.argmax(axis=1)
    refuse, allow = labels == 2, labels == 0
    nll = -log_softmax(logits, axis=1)[np.arange(len(labels)), labels]
    return DevResult(
        n=len(labels),
        accuracy=float((predicted == labels).mean()),
        cross_entropy=float(nll.mean()),
        refuse_recall=_share(predicted[refuse] == 2),
        unsafe_allow_rate=_share(predicted[refuse] == 0),
        over_refusal_rate=_share(predicted[allow] != 0),
    )


def fitted_temperature(logits: np.ndarray, labels: np.ndarray) -> float:
    """Temperature that minimizes the negative log-likelihood of ``labels``, within ``TEMPERATURES``.

    Source: Guo et al., "On Calibration of Modern Neural Networks", ICML 2017, section 4.2.
    """

    def loss(log_temperature: float) -> float:
        scaled = log_softmax(logits / np.exp(log_temperature), axis=1)
        return float(-scaled[np.arange(len(labels)), labels].mean())

    result = minimize_scalar(loss, bounds=np.log(TEMPERATURES), method="bounded")
    return float(np.exp(result.x))


def at_bound(temperature: float) -> bool:
    """Whether a fitted temperature is an end of its range: a better one lies beyond, if any does."""
    return bool(np.isclose(temperature, TEMPERATURES, rtol=1e-3).any())


def _share(hits: np.ndarray) -> float | None:
    return float(hits.mean()) if len(hits) else None


def _batches(order: list[int], examples: Sequence[TrainingExample]) -> list[list[int]]:
    batches: list[list[int]] = [[]]
    tokens = 0
    for i in order:
        length = len(examples[i].prompt.own)
        if batches[-1] and tokens + length > _TOKENS_PER_FORWARD:
            batches.append([])
            tokens = 0
        batches[-1].append(i)
        tokens += length
    return [batch for batch in batches if batch]

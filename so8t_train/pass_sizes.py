"""How large the forward passes of a fit will be: tokens and supervised positions of each."""

import math
from collections.abc import Sequence
from typing import NamedTuple

from so8t_train.config import FitConfig
from so8t_train.step_passes import PassKind, StepPass, step_passes
from so8t_train.training_data import TrainingExample, step_order
from so8t_train.training_plan import total_steps


class PassSize(NamedTuple):
    """One forward and backward pass over a pack of cases."""

    kind: PassKind
    step: int
    tokens: int
    supervised: int
    """Positions whose next token is learned: only there are logits computed."""
    longest: int
    """Tokens of its longest case, which attention sees together."""
    cases: int


def fit_passes(examples: Sequence[TrainingExample], config: FitConfig) -> list[PassSize]:
    """Every pass of the whole fit, in order."""
    per_epoch = math.ceil(len(examples) / config.cases_per_step)
    sizes: list[PassSize] = []
    order: list[list[int]] = []
    for step in range(total_steps(len(examples), config)):
        epoch, index = divmod(step, per_epoch)
        if index == 0:
            order = step_order(len(examples), config.cases_per_step, epoch, config.seed)
        batch = [examples[i] for i in order[index]]
        sizes += [_size(one, step) for one in step_passes(batch, config, epoch)]
    return sizes


def _size(one: StepPass, step: int) -> PassSize:
    heads = {item.head for item in one.sequences}
    return PassSize(
        one.kind,
        step,
        tokens=sum(map(len, heads)) + sum(len(item.own) for item in one.sequences),
        supervised=sum(len(item.targets) for item in one.sequences),
        longest=max(item.length for item in one.sequences),
        cases=len(one.sequences),
    )

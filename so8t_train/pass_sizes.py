"""How large the forward passes of a fit will be: tokens and supervised positions of each."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

from so8t_train.config import FitConfig
from so8t_train.packing import JOINED_TOKENS, PackedSequence, joined_micro_batches
from so8t_train.training_data import TrainingExample, step_order
from so8t_train.training_plan import total_steps

PassKind = Literal["verdict", "reply"]


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
        sizes += _sizes("verdict", step, [e.prompt for e in batch], config)
        replies = [e.reply for e in batch if e.reply and learns_reply(e, config, epoch)]
        sizes += _sizes("reply", step, replies, config)
    return sizes


def learns_reply(example: TrainingExample, config: FitConfig, epoch: int) -> bool:
    """Whether the trainer draws the reply of this example in this epoch."""
    if example.reply is None or not config.task_loss_weight:
        return False
    drawn = hashlib.sha256(f"{config.seed}/{epoch}/{example.id}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") < config.task_loss_share * 2**64


def _sizes(
    kind: PassKind, step: int, sequences: Sequence[PackedSequence], config: FitConfig
) -> Iterator[PassSize]:
    most = min(JOINED_TOKENS, config.micro_batch_size * config.max_length)
    for group in joined_micro_batches(sequences, config.micro_batch_size, most):
        packed = [sequences[i] for i in group]
        heads = {item.head for item in packed}
        yield PassSize(
            kind,
            step,
            tokens=sum(map(len, heads)) + sum(len(item.own) for item in packed),
            supervised=sum(len(item.targets) for item in packed),
            longest=max(item.length for item in packed),
            cases=len(packed),
        )

"""The forward passes of an optimizer step: which cases are computed together.

Training walks through them, planning counts them (``pass_sizes``).
"""

import hashlib
from collections.abc import Sequence
from typing import Literal, NamedTuple

from so8t_train.config import FitConfig
from so8t_train.packing import JOINED_TOKENS, PackedSequence, joined_micro_batches
from so8t_train.training_data import TrainingExample

PassKind = Literal["verdict", "reply"]


class StepPass(NamedTuple):
    """One forward and backward pass: its cases, and what is computed of each."""

    kind: PassKind
    examples: Sequence[TrainingExample]
    sequences: Sequence[PackedSequence]

    @property
    def cost(self) -> int:
        """Tokens of its cases, heads counted for each: what passes are shared out by."""
        return sum(item.length for item in self.sequences)


def step_passes(batch: Sequence[TrainingExample], config: FitConfig, epoch: int) -> list[StepPass]:
    """The passes over a step's cases: first the verdicts, then the replies drawn in this epoch."""
    passes = _grouped("verdict", [(e, e.prompt) for e in batch], config)
    replies = [(e, e.reply) for e in batch if e.reply and learns_reply(e, config, epoch)]
    return passes + _grouped("reply", replies, config)


def learns_reply(example: TrainingExample, config: FitConfig, epoch: int) -> bool:
    """Whether the reply of this example is learned in this epoch: drawn by seed, epoch and case."""
    if example.reply is None or not config.task_loss_weight:
        return False
    drawn = hashlib.sha256(f"{config.seed}/{epoch}/{example.id}".encode()).digest()
    return int.from_bytes(drawn[:8], "big") < config.task_loss_share * 2**64


def _grouped(
    kind: PassKind, items: Sequence[tuple[TrainingExample, PackedSequence]], config: FitConfig
) -> list[StepPass]:
    """Never more tokens in a pass than the micro-batch of the longest cases that are admitted."""
    most = min(JOINED_TOKENS, config.micro_batch_size * config.max_length)
    examples, sequences = [e for e, _ in items], [s for _, s in items]
    groups = joined_micro_batches(sequences, config.micro_batch_size, most)
    return [StepPass(kind, examples[g.start : g.stop], sequences[g.start : g.stop]) for g in groups]

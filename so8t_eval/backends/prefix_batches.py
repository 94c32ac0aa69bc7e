"""Pack prompts into batches in which every shared prefix is computed once.

Prompts sorted by token id lie beside those they share most with. Within a batch the prompts form a
tree whose every node is one token, computed for all sequences below it; from one batch to the next
the prefix common to both stays in memory.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

Ids = tuple[int, ...]


class LaidOutBatch(NamedTuple):
    """Tokens of one batch, each with its position, the sequences it belongs to, and outputs.

    Sequence numbers are places in the batch's prompts counted from the last, so that sequence 0 is
    the last prompt, whose memory the next batch may keep. ``outputs[i]`` is the place in ``tokens``
    of the verdict position of the i-th prompt.
    """

    tokens: list[int]
    positions: list[int]
    sequences: list[range]
    outputs: list[int]


def shared_length(a: Sequence[int], b: Sequence[int]) -> int:
    """Return the number of leading ids that both sequences share."""
    shortest = min(len(a), len(b))
    for i in range(shortest):
        if a[i] != b[i]:
            return i
    return shortest


def plan_batches(prompts: Sequence[Ids], max_tokens: int, max_prompts: int) -> Iterator[list[Ids]]:
    """Yield the different prompts, sorted, in batches of at most ``max_tokens`` tokens to compute.

    A longer prompt is a batch of its own.
    """
    batch: list[Ids] = []
    kept: Ids = ()
    inner = 0  # tokens of all prompts of the batch but the first
    for prompt in sorted(set(prompts)):
        added = len(prompt) - shared_length(batch[-1], prompt) if batch else 0
        if batch:
            first = len(batch[0]) - shared_length(kept, prompt)
            if len(batch) == max_prompts or first + inner + added > max_tokens:
                yield batch
                kept, batch, inner, added = batch[-1], [], 0, 0
        batch.append(prompt)
        inner += added
    if batch:
        yield batch


def reusable_length(kept: Sequence[int], batch: Sequence[Ids]) -> int:
    """Return how many leading ids of ``kept`` all prompts of a sorted batch share.

    Always leaves each prompt a token to compute, since only computed tokens give logits.
    """
    return min(shared_length(kept, batch[0]), shared_length(kept, batch[-1]), len(batch[0]) - 1)


def lay_out(batch: Sequence[Ids], reused: int) -> LaidOutBatch:
    """Return the tokens of a sorted batch after ``reused`` positions that are in memory already."""
    laid_out = LaidOutBatch([], [], [], [])
    n = len(batch)
    shares = [reused, *(shared_length(a, b) for a, b in itertools.pairwise(batch))]
    for i, (prompt, start) in enumerate(zip(batch, shares, strict=True)):
        ends = [i + 1] * (len(prompt) - start)  # first later prompt that does not share the token
        common = len(prompt)
        for j in range(i + 1, n):
            common = min(common, shares[j])
            if common <= start:
                break
            ends[: common - start] = [j + 1] * (common - start)
        laid_out.tokens.extend(prompt[start:])
        laid_out.positions.extend(range(start, len(prompt)))
        laid_out.sequences.extend(range(n - end, n - i) for end in ends)
        laid_out.outputs.append(len(laid_out.tokens) - 1)
    return laid_out

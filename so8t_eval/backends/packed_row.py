"""Lay prompts in one row in which every shared prefix is computed once.

Sorted prompts lie beside those they share most with; each computes only what it does not share with
its neighbour, and looks at the neighbour's tokens for the rest.
"""

from collections.abc import Sequence
from typing import NamedTuple

from so8t_eval.backends.packed_attention import KeyRange, PackLayout, Span
from so8t_eval.backends.prefix_batches import Ids, shared_length


class PackedRow(NamedTuple):
    """Tokens to compute with their positions, what each may look at, and the verdict positions.

    ``outputs[i]`` is the place in ``tokens`` of the last token of the i-th prompt.
    """

    tokens: list[int]
    positions: list[int]
    layout: PackLayout
    outputs: list[int]


def lay_out_row(prompts: Sequence[Ids], cached: int) -> PackedRow:
    """Return the row of sorted, different prompts; the first one's ``cached`` leading ids are keys.

    Every prompt keeps at least one token to compute, since only computed tokens give logits:
    ``cached`` must be less than the first one's length.
    """
    tokens: list[int] = []
    positions: list[int] = []
    spans: list[Span] = []
    outputs: list[int] = []
    path = [KeyRange(0, cached)]
    previous = prompts[0][:cached]
    for prompt in prompts:
        shared = shared_length(previous, prompt)
        context = _leading(path, shared)
        start = len(tokens)
        tokens += prompt[shared:]
        positions += range(shared, len(prompt))
        spans.append(Span(start, len(tokens), tuple(context)))
        outputs.append(len(tokens) - 1)
        path = [*context, KeyRange(cached + start, cached + len(tokens))]
        previous = prompt
    return PackedRow(tokens, positions, PackLayout(tuple(spans)), outputs)


def _leading(path: Sequence[KeyRange], n: int) -> list[KeyRange]:
    """The first ``n`` keys along a path, neighbouring ranges joined."""
    ranges: list[KeyRange] = []
    for start, stop in path:
        if n <= 0:
            break
        taken = min(n, stop - start)
        n -= taken
        if ranges and ranges[-1].stop == start:
            ranges[-1] = KeyRange(ranges[-1].start, start + taken)
        elif taken:
            ranges.append(KeyRange(start, start + taken))
    return ranges

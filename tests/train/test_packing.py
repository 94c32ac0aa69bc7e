"""Packing: every token once, shared heads once, positions and targets as alone."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from so8t_train.packing import PackedSequence, pack

CPU = torch.device("cpu")
ids = st.lists(st.integers(0, 99), max_size=5).map(tuple)


@st.composite
def sequences(draw: st.DrawFn) -> list[PackedSequence]:
    heads = draw(st.lists(ids, min_size=1, max_size=3))
    items = []
    for _ in range(draw(st.integers(1, 6))):
        own = (*draw(ids), draw(st.integers(0, 99)))
        first = draw(st.integers(0, len(own) - 1))
        targets = draw(st.lists(st.integers(0, 99), max_size=len(own) - first))
        weight = draw(st.floats(0.125, 4.0, width=32))
        items.append(
            PackedSequence(draw(st.sampled_from(heads)), own, first, tuple(targets), weight)
        )
    return items


@given(items=sequences())
def test_every_case_can_be_read_back_from_the_pack(items: list[PackedSequence]) -> None:
    packed = pack(items, CPU)
    row, positions = packed.ids[0].tolist(), packed.positions[0].tolist()
    case_spans = [s for s in packed.layout.spans if s.stop in _ends(items, packed.layout.spans)]
    assert len(case_spans) == len(items)
    for item, span in zip(items, case_spans, strict=True):
        seen = [i for start, stop in (*span.context, span[:2]) for i in range(start, stop)]
        assert tuple(row[i] for i in seen) == item.head + item.own
        assert [positions[i] for i in seen] == list(range(item.length))


def _ends(items: list[PackedSequence], spans: tuple[object, ...]) -> set[int]:
    """Ends of the cases' own tokens: after a head of its own, if it is the first with that head."""
    ends, place, heads = set(), 0, set()
    for item in items:
        if item.head and item.head not in heads:
            heads.add(item.head)
            place += len(item.head)
        place += len(item.own)
        ends.add(place)
    return ends


@given(items=sequences())
def test_spans_cover_all_tokens_in_order_and_heads_are_stored_once(
    items: list[PackedSequence],
) -> None:
    packed = pack(items, CPU)
    spans = packed.layout.spans
    assert [s.start for s in spans] == [0, *(s.stop for s in spans[:-1])]
    assert spans[-1].stop == packed.tokens
    unique_heads = {item.head for item in items}
    expected = sum(map(len, unique_heads)) + sum(len(item.own) for item in items)
    assert packed.tokens == expected


@given(items=sequences())
def test_segments_name_the_span_of_every_token(items: list[PackedSequence]) -> None:
    packed = pack(items, CPU)
    segments = packed.segments[0].tolist()
    for number, span in enumerate(packed.layout.spans, start=1):
        assert segments[span.start : span.stop] == [number] * (span.stop - span.start)


@given(items=sequences())
def test_supervised_tokens_targets_and_weights_keep_their_order(
    items: list[PackedSequence],
) -> None:
    packed = pack(items, CPU)
    row = packed.ids[0].tolist()
    expected = [
        (item.own[item.first_supervised + i], target, item.weight)
        for item in items
        for i, target in enumerate(item.targets)
    ]
    found = zip(
        [row[i] for i in packed.supervised.tolist()],
        packed.targets.tolist(),
        packed.weights.tolist(),
        strict=True,
    )
    assert list(found) == expected


def test_a_shared_head_costs_its_tokens_once() -> None:
    head = tuple(range(50))
    items = [PackedSequence(head, (60 + i, 70), 1, (80,)) for i in range(4)]
    packed = pack(items, CPU)
    assert packed.tokens == 50 + 4 * 2
    assert packed.supervised.tolist() == [51, 53, 55, 57]


def test_a_head_used_again_after_another_is_not_stored_again() -> None:
    first, second = (1, 2, 3), (4, 5)
    items = [PackedSequence(head, (9,), 0, ()) for head in (first, second, first)]
    packed = pack(items, CPU)
    assert packed.ids[0].tolist() == [1, 2, 3, 9, 4, 5, 9, 9]
    assert packed.layout.spans[-1].context == ((0, 3),)

"""Packed rows: every prompt's tokens and context spell it whole, nothing shared is computed twice."""

from hypothesis import given, settings
from hypothesis import strategies as st

from so8t_eval.backends.packed_row import lay_out_row
from so8t_eval.backends.prefix_batches import Ids

prompts = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=10).map(tuple), min_size=1, max_size=20
).map(lambda many: sorted(set(many)))


@given(prompts=prompts, share=st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_each_prompt_sees_exactly_its_own_earlier_tokens(prompts: list[Ids], share: float) -> None:
    cached = int(share * (len(prompts[0]) - 1))
    row = lay_out_row(prompts, cached)
    keys = [*prompts[0][:cached], *row.tokens]
    for prompt, span, output in zip(prompts, row.layout.spans, row.outputs, strict=True):
        context = [token for start, stop in span.context for token in keys[start:stop]]
        assert (*context, *row.tokens[span.start : span.stop]) == prompt
        assert output == span.stop - 1
        assert row.positions[span.start : span.stop] == list(range(len(context), len(prompt)))
        assert all(start < stop <= cached + span.start for start, stop in span.context)


@given(prompts=prompts)
@settings(max_examples=200, deadline=None)
def test_a_shared_prefix_is_computed_once(prompts: list[Ids]) -> None:
    row = lay_out_row(prompts, 0)
    prefixes = {prompt[:n] for prompt in prompts for n in range(1, len(prompt) + 1)}
    assert len(row.tokens) == len(prefixes)

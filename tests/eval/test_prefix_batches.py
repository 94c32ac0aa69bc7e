"""Prefix batches: every prompt is computed whole, every shared prefix once per batch."""

from hypothesis import given, settings
from hypothesis import strategies as st

from so8t_eval.backends.prefix_batches import Ids, lay_out, plan_batches, reusable_length

prompts = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(tuple), min_size=1, max_size=30
)


@given(prompts=prompts, max_tokens=st.integers(1, 40), max_prompts=st.integers(1, 6))
@settings(max_examples=300, deadline=None)
def test_memory_holds_each_prompt_at_its_verdict_position(
    prompts: list[Ids], max_tokens: int, max_prompts: int
) -> None:
    judged: list[Ids] = []
    kept: Ids = ()
    for batch in plan_batches(prompts, max_tokens, max_prompts):
        reused = reusable_length(kept, batch)
        laid_out = lay_out(batch, reused)
        assert len(batch) <= max_prompts
        assert len(laid_out.tokens) <= max_tokens or len(batch) == 1
        memory = {sequence: list(kept[:reused]) for sequence in range(len(batch))}
        for place, (token, position, sequences) in enumerate(
            zip(laid_out.tokens, laid_out.positions, laid_out.sequences, strict=True)
        ):
            for sequence in sequences:
                assert len(memory[sequence]) == position
                memory[sequence].append(token)
            for i, output in enumerate(laid_out.outputs):
                if place == output:
                    assert tuple(memory[len(batch) - 1 - i]) == batch[i]
        nodes = {prompt[:n] for prompt in batch for n in range(reused + 1, len(prompt) + 1)}
        assert len(laid_out.tokens) == len(nodes)
        judged += batch
        kept = tuple(memory[0])
        assert kept == batch[-1]
    assert judged == sorted(set(prompts))

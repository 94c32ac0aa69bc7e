"""Attention over a pack of cases: the same code scores prompts in ``so8t_eval``."""

from so8t_eval.backends.packed_attention import (
    UNUSED_MASK,
    KeyRange,
    PackLayout,
    Span,
    use_packed_attention,
)

__all__ = ["UNUSED_MASK", "KeyRange", "PackLayout", "Span", "use_packed_attention"]

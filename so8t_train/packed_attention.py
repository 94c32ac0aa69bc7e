"""Attention over a pack of cases, each case against its head and itself only.

Registered with transformers under its own name. A dense block mask would spend time and memory on
every pair of cases; here each case is one small attention call, so cost grows with the unique
tokens. Without a layout the call is ordinary scaled-dot-product attention.
"""

from typing import Any, Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

PACKED_ATTENTION: Final = "so8t_packed"


class Span(NamedTuple):
    """Tokens [start, stop) of one case or head, and those of the head it also looks at."""

    start: int
    stop: int
    head_start: int
    head_stop: int


class PackLayout(NamedTuple):
    """Every span of a pack, in token order, covering all tokens."""

    spans: tuple[Span, ...]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    packed_layout: PackLayout | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention output (1, tokens, heads, head size) of query (1, heads, tokens, head size)."""
    if packed_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return output
    window = options.get("sliding_window") or getattr(module, "sliding_window", None)
    pieces = [
        _span_attention(query, key, value, span, scaling, options.get("softcap"), window)
        for span in packed_layout.spans
    ]
    return torch.cat(pieces, dim=2).transpose(1, 2).contiguous(), None


def _span_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    span: Span,
    scaling: float | None,
    softcap: float | None,
    window: int | None,
) -> Tensor:
    own_query = query[:, :, span.start : span.stop]
    seen_key, seen_value = _seen(key, span), _seen(value, span)
    length, head = span.stop - span.start, span.head_stop - span.head_start
    plain = softcap is None and (window is None or length + head <= window)
    if plain and head == 0:
        return F.scaled_dot_product_attention(
            own_query, seen_key, seen_value, is_causal=True, scale=scaling, enable_gqa=True
        )
    allowed = _causal(length, head, window, query.device)
    if plain:
        return F.scaled_dot_product_attention(
            own_query, seen_key, seen_value, attn_mask=allowed, scale=scaling, enable_gqa=True
        )
    groups = query.shape[1] // key.shape[1]
    scores = own_query @ seen_key.repeat_interleave(groups, 1).mT
    scores = scores * (scaling if scaling is not None else query.shape[-1] ** -0.5)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~allowed, torch.finfo(scores.dtype).min)
    weights = scores.float().softmax(dim=-1).to(query.dtype)
    return weights @ seen_value.repeat_interleave(groups, 1)


def _seen(tensor: Tensor, span: Span) -> Tensor:
    own = tensor[:, :, span.start : span.stop]
    if span.head_start == span.head_stop:
        return own
    return torch.cat([tensor[:, :, span.head_start : span.head_stop], own], dim=2)


def _causal(length: int, head: int, window: int | None, device: torch.device) -> Tensor:
    """(length, head + length) boolean: token i sees the whole head and own tokens up to itself."""
    allowed = torch.ones(length, head + length, dtype=torch.bool, device=device).tril(head)
    return allowed if window is None else allowed.triu(head - window + 1)


def use_packed_attention(model: Any) -> None:
    """Switch a transformers model to packed attention (plain SDPA where no layout is given)."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)
    AttentionMaskInterface.register(PACKED_ATTENTION, sdpa_mask)
    model.set_attn_implementation(PACKED_ATTENTION)

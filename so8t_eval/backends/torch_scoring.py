"""Verdict logits and replies from any transformers decoder, shared prefixes computed once.

All prompts of a batch lie in one row without padding (``packed_row``); the keys and values of the
row's first prompt stay for the next call, so a system policy is computed once.
"""

import os
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, Final, NamedTuple

# Threads that spin at OpenMP's barriers stall for whole time slices as soon as another process
# wants a core; sleeping ones cost nothing that shows. Read when torch is first imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
import torch
from torch import Tensor

from so8t_eval.backends.base import Logits
from so8t_eval.backends.packed_attention import UNUSED_MASK, KeyRange, PackLayout, Span
from so8t_eval.backends.packed_row import lay_out_row
from so8t_eval.backends.prefix_batches import Ids, plan_batches, shared_length
from so8t_eval.errors import BackendError

__all__ = ["DecoderParts", "TorchVerdictScorer", "torch"]

MAX_PROMPTS_PER_ROW: Final = 256


class DecoderParts(NamedTuple):
    """What scoring needs of a causal language model that uses packed attention.

    ``decoder`` is the transformers model below the output matrix; ``embed`` maps ids (1, n) to
    input embeddings (1, n, hidden), ``verdict_logits`` last hidden states (n, hidden) to (n, 3) in
    severity order, ``vocabulary_logits`` the same states to (n, vocabulary).
    """

    decoder: Callable[..., Any]
    embed: Callable[[Tensor], Tensor]
    verdict_logits: Callable[[Tensor], Tensor]
    vocabulary_logits: Callable[[Tensor], Tensor]
    device: torch.device


class TorchVerdictScorer:
    """Scores prompts and continues them; holds the keys and values of the last one scored."""

    def __init__(
        self,
        parts: DecoderParts,
        *,
        verdict_ids: Sequence[int],
        ending_ids: Collection[int],
        batch_tokens: int,
        max_prompt_tokens: int,
        max_positions: int,
    ) -> None:
        self._parts = parts
        self._verdict_ids = list(verdict_ids)
        self._ending_ids = frozenset(ending_ids)
        self._batch_tokens = batch_tokens
        self._max_prompt_tokens = max_prompt_tokens
        self._max_positions = max_positions
        self._cache: Any = None
        self._kept: Ids = ()  # the ids whose keys and values the cache holds

    def score(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Logits]]:
        """Yield ``(index, logits)`` for every prompt, sorted by content.

        Raises:
            BackendError: a prompt is empty or too long, or the computation fails.
        """
        places: dict[Ids, list[int]] = {}
        for index, prompt in enumerate(prompts):
            self._check_length(prompt)
            places.setdefault(tuple(prompt), []).append(index)
        for batch in plan_batches(list(places), self._batch_tokens, MAX_PROMPTS_PER_ROW):
            for ids, logits in zip(batch, self._score_row(batch), strict=True):
                for index in places[ids]:
                    yield index, logits

    def score_single(self, ids: Sequence[int], cold: bool = False) -> Logits:
        """Logits of one prompt alone, reusing what it shares with the previous call.

        Raises:
            BackendError: the prompt is empty or too long, or the computation fails.
        """
        self._check_length(ids)
        if cold:
            self.forget()
        return self._score_row([tuple(ids)])[0]

    def reply(self, ids: Sequence[int], verdict_index: int, max_tokens: int) -> Iterator[int]:
        """Yield the ids of the greedy continuation after a verdict token, its end excluded."""
        if self._kept != tuple(ids):
            self.score_single(ids)
        token = self._verdict_ids[verdict_index]
        for _ in range(min(max_tokens, self._max_positions - len(ids) - 1)):
            token = self._next_token(token)
            if token in self._ending_ids:
                break
            yield token

    def forget(self) -> None:
        """Drop all keys and values."""
        self._cache, self._kept = None, ()

    @torch.inference_mode()
    def _score_row(self, batch: Sequence[Ids]) -> list[Logits]:
        """Compute sorted prompts in one row; the first becomes what is kept."""
        cached = min(shared_length(self._kept, batch[0]), len(batch[0]) - 1)
        row = lay_out_row(batch, cached)
        states = self._extend(cached, row.tokens, row.positions, row.layout)
        three = self._parts.verdict_logits(states[row.outputs]).tolist()
        self._crop(len(batch[0]))
        return [Logits(*values) for values in three]

    @torch.inference_mode()
    def _next_token(self, token: int) -> int:
        """Append ``token`` and return the likeliest next one that is no verdict."""
        n = len(self._kept)
        layout = PackLayout((Span(0, 1, (KeyRange(0, n),)),))
        states = self._extend(n, [token], [n], layout)
        logits = self._parts.vocabulary_logits(states[-1:])[0].clone()
        logits[self._verdict_ids] = float("-inf")
        return int(logits.argmax())

    def _extend(
        self, cached: int, tokens: list[int], positions: list[int], layout: PackLayout
    ) -> Tensor:
        """Last hidden states (tokens, hidden); tokens join the first ``cached`` that are kept."""
        self._crop(cached)
        cache, kept = self._cache, self._kept
        self.forget()  # a computation that is cut off must not leave a torn cache behind
        if cache is None:
            cache = _new_cache()
        states = self._forward(cache, tokens, positions, layout)
        self._cache, self._kept = cache, (*kept, *tokens)
        return states

    def _forward(
        self, cache: Any, tokens: list[int], positions: list[int], layout: PackLayout
    ) -> Tensor:
        device = self._parts.device
        try:
            output = self._parts.decoder(
                inputs_embeds=self._parts.embed(torch.tensor([tokens], device=device)),
                attention_mask=UNUSED_MASK.to(device),
                position_ids=torch.tensor([positions], device=device),
                past_key_values=cache,
                use_cache=True,
                packed_layout=layout,
            )
        except RuntimeError as error:  # out of memory among them
            raise BackendError(
                f"PyTorch failed on a row of {len(tokens)} tokens: {error}; use a smaller "
                "--batch-tokens or free memory"
            ) from error
        states: Tensor = output.last_hidden_state[0]
        return states

    def _crop(self, n: int) -> None:
        """Keep the first ``n`` positions of the cache."""
        surplus = len(self._kept) - n
        if n == 0:
            self.forget()
        elif surplus:
            self._cache.crop(-surplus)  # negative: positions to drop, in every transformers 5
            self._kept = self._kept[:n]

    def _check_length(self, ids: Sequence[int]) -> None:
        if not 0 < len(ids) <= self._max_prompt_tokens:
            raise BackendError(
                f"a prompt of {len(ids)} tokens does not fit the context of "
                f"{self._max_prompt_tokens}; judge it in windows"
            )


def _new_cache() -> Any:
    from transformers import DynamicCache

    return DynamicCache()

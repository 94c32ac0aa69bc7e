"""The llama.cpp backend: judges with an exported GGUF file, as any llama.cpp program would."""

import codecs
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from so8t_eval.backends.base import BackendInfo, Logits, SpecialToken
from so8t_eval.backends.gguf_header import MetadataValue, So8tKeys, read_gguf_metadata, so8t_keys
from so8t_eval.backends.gguf_parts import gguf_parts
from so8t_eval.backends.llamacpp_context import (
    LlamaContext,
    LlamaModel,
    default_threads,
    runtime_version,
)
from so8t_eval.backends.prefix_batches import (
    Ids,
    lay_out,
    plan_batches,
    reusable_length,
)
from so8t_eval.errors import BackendError, ModelFileError
from so8t_eval.file_hash import files_sha256
from so8t_eval.labels import VERDICT_TOKENS
from so8t_eval.protocol import DEFAULT_MAX_PROMPT_TOKENS, VerdictProtocol

DEFAULT_BATCH_TOKENS: Final = 256
DEFAULT_MAX_SEQUENCES: Final = 64
_REPLY_ROOM: Final = 512
"""Positions kept free after the longest prompt, for a reply."""
_CONTROL_KINDS: Final = 1 | 8
"""LLAMA_TOKEN_ATTR bits UNKNOWN and CONTROL: text without special tokens never gives these."""
_USER_DEFINED_KIND: Final = 16


class LlamaCppBackend:
    """A GGUF file in llama.cpp; of a split model the first part, which stands for all.

    ``batch_tokens`` are computed together in one batch; ``exact`` turns flash attention off and
    keeps keys and values in float32, slower and closest to PyTorch, for parity checks.

    Raises:
        ModelFileError: the file or a part is missing, broken, or not an export of this SO8T version.
    """

    def __init__(
        self,
        path: Path | str,
        *,
        threads: int | None = None,
        batch_tokens: int | None = None,
        max_sequences: int = DEFAULT_MAX_SEQUENCES,
        max_prompt_tokens: int = DEFAULT_MAX_PROMPT_TOKENS,
        exact: bool = False,
    ) -> None:
        source = Path(path)
        metadata = read_gguf_metadata(source)
        parts = gguf_parts(source, metadata)
        keys = so8t_keys(source, metadata)
        self._model = LlamaModel(source)
        self._context: LlamaContext | None = None
        try:
            self._verdict_ids = _checked_verdict_ids(source, self._model, keys)
            self.protocol = _checked_protocol(source, self._model, metadata, keys)
        except ModelFileError:
            self._model.close()
            raise
        self._threads = threads or default_threads()
        self._batch_tokens = batch_tokens or DEFAULT_BATCH_TOKENS
        self._max_sequences = max_sequences
        self._exact = exact
        self.max_prompt_tokens = min(max_prompt_tokens, self._model.trained_context)
        self._kept: Ids = ()  # what sequence 0 of the context holds
        self.info = BackendInfo(
            backend="llamacpp",
            model=source.name,
            model_sha256=files_sha256(parts),
            version=runtime_version(),
            settings={
                "threads": self._threads,
                "batch_tokens": self._batch_tokens,
                "max_sequences": max_sequences,
                "max_prompt_tokens": self.max_prompt_tokens,
                "flash_attention": not exact,
                "kv_type": "f32" if exact else "f16",
            },
            operating_points=keys.operating_points,
        )

    def tokenize(self, text: str, parse_special: bool) -> list[int]:
        """Token ids of ``text`` under llama.cpp's tokenizer, no tokens added."""
        return self._model.tokenize(text, parse_special)

    def piece(self, token: int) -> str:
        """The vocabulary entry of a token, for messages."""
        return self._model.token_text(token)

    def special_tokens(self) -> list[SpecialToken]:
        """Every control, user-defined and verdict token of the vocabulary, by id."""
        kinds = {token: self._model.token_kind(token) for token in range(self._model.n_tokens)}
        return [
            SpecialToken(token, self._model.token_text(token), bool(kind & _CONTROL_KINDS))
            for token, kind in kinds.items()
            if kind & (_CONTROL_KINDS | _USER_DEFINED_KIND) or token in self._verdict_ids
        ]

    def score(self, prompts: Sequence[Sequence[int]]) -> Iterator[tuple[int, Logits]]:
        """Yield ``(index, logits)`` for every prompt, sorted by content; see ``Backend``."""
        places: dict[Ids, list[int]] = {}
        for index, prompt in enumerate(prompts):
            self._check_length(prompt)
            places.setdefault(tuple(prompt), []).append(index)
        for batch in plan_batches(list(places), self._batch_tokens, self._max_sequences):
            for ids, logits in zip(batch, self._decode(batch), strict=True):
                for index in places[ids]:
                    yield index, logits

    def score_single(self, ids: Sequence[int], cold: bool = False) -> Logits:
        """Logits of one prompt alone, reusing what it shares with the previous call."""
        self._check_length(ids)
        return self._decode([tuple(ids)], cold=cold)[0]

    def reply(self, ids: Sequence[int], verdict_index: int, max_tokens: int) -> Iterator[str]:
        """Continue the prompt after a verdict, greedily, from the prefill of ``score_single``."""
        if self._kept != tuple(ids):
            self.score_single(ids)
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        token = self._verdict_ids[verdict_index]
        for _ in range(min(max_tokens, self._open_context().n_positions - len(ids) - 1)):
            token = self._next_token(token)
            if self._model.ends_reply(token):
                break
            if text := decoder.decode(self._model.token_bytes(token)):
                yield text
        if text := decoder.decode(b"", final=True):
            yield text

    def close(self) -> None:
        """Free the context and the model."""
        if self._context is not None:
            self._context.close()
            self._context = None
        self._kept = ()
        self._model.close()

    def _decode(self, batch: Sequence[Ids], cold: bool = False) -> list[Logits]:
        """Compute sorted prompts in one batch; the last becomes what is kept."""
        context = self._open_context()
        reused = 0 if cold else reusable_length(self._kept, batch)
        if not context.keep_only(reused):
            reused = 0
        self._kept = self._kept[:reused]
        context.share(len(batch))
        laid_out = lay_out(batch, reused)
        try:
            context.decode(
                laid_out.tokens, laid_out.positions, laid_out.sequences, laid_out.outputs
            )
        except BackendError:
            context.keep_only(0)
            self._kept = ()
            raise
        self._kept = batch[-1]
        return [self._verdict_logits(context, place) for place in laid_out.outputs]

    def _verdict_logits(self, context: LlamaContext, place: int) -> Logits:
        row = context.logits(place)
        allow, escalate, refuse = (float(row[token]) for token in self._verdict_ids)
        return Logits(allow, escalate, refuse)

    def _next_token(self, token: int) -> int:
        """Append ``token`` and return the likeliest next one that is no verdict."""
        context = self._open_context()
        context.decode([token], [len(self._kept)], [range(1)], [0])
        self._kept = (*self._kept, token)
        row = context.logits(0)
        row[list(self._verdict_ids)] = float("-inf")
        return int(row.argmax())

    def _open_context(self) -> LlamaContext:
        """The context, made on first use: tokenizing needs none."""
        if self._context is None:
            longest = max(self._batch_tokens, self.max_prompt_tokens)
            self._context = LlamaContext(
                self._model,
                n_positions=self.max_prompt_tokens + max(self._batch_tokens, _REPLY_ROOM),
                batch_tokens=self._batch_tokens,
                longest_batch=longest,
                max_sequences=self._max_sequences,
                threads=self._threads,
                flash_attention=not self._exact,
                float32_memory=self._exact,
            )
        return self._context

    def _check_length(self, ids: Sequence[int]) -> None:
        if not 0 < len(ids) <= self.max_prompt_tokens:
            raise BackendError(
                f"a prompt of {len(ids)} tokens does not fit the context of "
                f"{self.max_prompt_tokens}; judge it in windows"
            )


def _checked_verdict_ids(path: Path, model: LlamaModel, keys: So8tKeys) -> tuple[int, int, int]:
    for token, name in zip(keys.verdict_tokens, VERDICT_TOKENS, strict=True):
        if not 0 <= token < model.n_tokens:
            raise ModelFileError(
                f"{path}: verdict token id {token} is out of the vocabulary of {model.n_tokens}; "
                "export the file again"
            )
        if model.token_text(token) != name:
            raise ModelFileError(
                f"{path}: expected verdict token {name} at id {token}, found "
                f"{model.token_text(token)!r}; export the file again"
            )
    return keys.verdict_tokens


def _checked_protocol(
    path: Path, model: LlamaModel, metadata: dict[str, MetadataValue], keys: So8tKeys
) -> VerdictProtocol:
    template = metadata.get("tokenizer.chat_template")
    if not isinstance(template, str):
        raise ModelFileError(f"{path} has no chat template; export it from an instruct model")
    # llama.cpp invents defaults for absent ids, so the file's own keys decide.
    texts = []
    for name in ("bos", "eos"):
        token = metadata.get(f"tokenizer.ggml.{name}_token_id")
        texts.append(model.token_text(token) if isinstance(token, int) else "")
    protocol = VerdictProtocol(template, *texts)
    if protocol.hash != keys.protocol_hash:
        raise ModelFileError(
            f"{path}: its chat template makes protocol {protocol.hash[:12]}…, but the model was "
            f"trained with {keys.protocol_hash[:12]}…; the template or special tokens were changed "
            "after export, or another SO8T version wrote it: export it again"
        )
    return protocol

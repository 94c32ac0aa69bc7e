"""Calibration cases of an export, and what each form of the model says about them."""

import copy
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from so8t_eval.backends.base import Backend
from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.case_sampling import stratified_sample
from so8t_eval.cases import Case, load_cases
from so8t_eval.errors import ExportError, UsageError
from so8t_eval.file_hash import file_sha256
from so8t_train.base_model import quiet_libraries
from so8t_train.base_weights import EMBEDDING
from so8t_train.packed_attention import use_packed_attention
from so8t_train.packing import Pack, PackedSequence, pack
from so8t_train.safety_model import SafetyModel

DEFAULT_FILE: Final = Path(__file__).parent / "data" / "dev.jsonl"
DEFAULT_CASES: Final = 60
DEFAULT_IMPORTANCE_FILE: Final = DEFAULT_FILE.with_name("train.jsonl")
"""Other cases than those compared on: on its own cases a matrix looks better than it is."""
DEFAULT_IMPORTANCE_CASES: Final = 120
_MAX_PROMPT_TOKENS: Final = 1024
_TOKENS_PER_FORWARD: Final = 1024
_SAMPLE_SEED: Final = 0


class CalibrationSet(NamedTuple):
    """Cases sampled from a file, with their prompts as packed sequences, in the same order.

    ``left_out`` cases of the file were too long, or not to be used.
    """

    file: Path
    sha256: str
    left_out: int
    cases: list[Case]
    prompts: list[PackedSequence]

    @property
    def whole_prompts(self) -> list[PackedSequence]:
        """Prompts that share no head: every one is computed from its first token on."""
        return [p._replace(head=(), own=(*p.head, *p.own)) for p in self.prompts]

    @property
    def ids(self) -> list[list[int]]:
        """Whole prompts, for runtimes that take ids."""
        return [[*prompt.head, *prompt.own] for prompt in self.prompts]


class Outputs(NamedTuple):
    """One form of the model on all cases, in case order, float64 and float32.

    ``verdicts`` (n, 3) are probabilities in severity order; ``vocabulary`` (n, base vocabulary) the
    ordinary tokens' logits, None where a runtime was asked for verdicts alone.
    """

    verdicts: npt.NDArray[np.float64]
    vocabulary: npt.NDArray[np.float32] | None


class Difference(NamedTuple):
    """How far two forms of the model are apart; per case the largest of three probabilities."""

    max_probability: float
    mean_probability: float
    flips: list[str]
    unsafe_flips: list[str]
    """Flips from refuse to allow."""


def load_calibration(
    file: Path,
    n: int,
    tokenizer: HfTokenizer,
    *,
    option: str = "--calibration",
    without: Collection[str] = (),
) -> CalibrationSet:
    """``n`` cases of ``file`` with the verdicts in proportion; over-long prompts are left out.

    So are cases whose content hash is in ``without``. ``option`` is what messages call the option
    that named the file.

    Raises:
        CaseFileError, UsageError: the file is broken, or no prompt is short enough.
    """
    usable: list[tuple[Case, PackedSequence]] = []
    cases = load_cases(file)
    for case in cases:
        if without and case.content_hash in without:
            continue
        ids = tokenizer.protocol.prompt_ids(case.conversation, case.policy, tokenizer.tokenize)
        own = (*ids.body, *ids.tail)
        if len(ids.head) + len(own) <= _MAX_PROMPT_TOKENS:
            usable.append((case, PackedSequence(ids.head, own, len(own) - 1, (0,))))
    if not usable:
        raise UsageError(
            f"{option} {file}: expected cases of at most {_MAX_PROMPT_TOKENS} tokens"
            f"{' that are not compared on' if without else ''}, found none; give other cases"
        )
    prompts = {case.id: prompt for case, prompt in usable}
    chosen = stratified_sample([case for case, _ in usable], n, _SAMPLE_SEED)
    return CalibrationSet(
        file,
        file_sha256(file),
        len(cases) - len(usable),
        chosen,
        [prompts[case.id] for case in chosen],
    )


def live_outputs(model: SafetyModel, prompts: Sequence[PackedSequence]) -> Outputs:
    """What the trained model says, gates and LoRA in place."""
    bank = model.bank
    if bank is not None:
        bank.begin_eval()
    try:
        return _collected(prompts, model.vocab_size, lambda packed: _live(model, packed))
    finally:
        if bank is not None:
            bank.end()


def merged_model(like: Any, weights: dict[str, Tensor]) -> nn.Module:
    """A plain transformers model of merged weights, of the class and configuration of ``like``."""
    config = merged_config(like.config, weights)
    # Gemma 2 caps its attention scores, which SDPA cannot.
    config._attn_implementation = "sdpa" if type(like)._supports_sdpa else "eager"
    with quiet_libraries():
        model: nn.Module = type(like).from_pretrained(
            None, config=config, state_dict=dict(weights), use_safetensors=True
        )
    return model.eval()


def merged_config(base_config: Any, weights: Mapping[str, Tensor]) -> Any:
    """The transformers configuration of merged weights, from that of their base."""
    config = copy.deepcopy(base_config)
    config.vocab_size = weights[EMBEDDING].shape[0]
    config.dtype = torch.float32
    config.__dict__.pop("quantization_config", None)
    return config


def merged_outputs(model: Any, prompts: Sequence[PackedSequence], base_vocabulary: int) -> Outputs:
    """What a plain transformers model says whose vocabulary ends with the verdict tokens."""
    use_packed_attention(model)
    mask = torch.zeros(1, 1, 1, 1)
    cap = getattr(model.config, "final_logit_softcapping", None)

    def forward(packed: Pack) -> Tensor:
        states = model.get_decoder()(
            input_ids=packed.ids,
            attention_mask=mask,
            position_ids=packed.positions,
            use_cache=False,
            packed_layout=packed.layout,
        ).last_hidden_state
        logits: Tensor = model.get_output_embeddings()(states[0, packed.supervised])
        return torch.tanh(logits / cap) * cap if cap else logits

    return _collected(prompts, base_vocabulary, forward)


def backend_outputs(
    backend: Backend, file: str, calibration: CalibrationSet, tokenizer: HfTokenizer
) -> Outputs:
    """What an exported file says in its runtime; closes ``backend``.

    Raises:
        ExportError: the file's tokenizer gives other ids than the one trained with.
    """
    try:
        _check_ids(file, backend, calibration, tokenizer)
        logits = np.zeros((len(calibration.prompts), 3))
        for index, three in backend.score(calibration.ids):
            logits[index] = three
    finally:
        backend.close()
    return Outputs(_softmax(logits), None)


def difference(reference: Outputs, other: Outputs, ids: Sequence[str]) -> Difference:
    """Compare two forms of the model, case by case; ``ids`` name the cases."""
    per_case = np.abs(reference.verdicts - other.verdicts).max(axis=1)
    if not np.isfinite(other.verdicts).all():
        return Difference(math.inf, math.inf, list(ids), [])
    before, after = reference.verdicts.argmax(axis=1), other.verdicts.argmax(axis=1)
    return Difference(
        float(per_case.max()),
        float(per_case.mean()),
        _named(ids, before != after),
        _named(ids, (before == 2) & (after == 0)),
    )


def relative_logit_difference(reference: Outputs, other: Outputs) -> float:
    """Largest difference of the ordinary tokens' logits, relative to the largest logit."""
    if reference.vocabulary is None or other.vocabulary is None:
        raise ValueError("expected outputs with vocabulary logits, found verdicts alone")
    scale = float(np.abs(reference.vocabulary).max())
    return float(np.abs(reference.vocabulary - other.vocabulary).max()) / scale


def _named(ids: Sequence[str], chosen: npt.NDArray[np.bool_]) -> list[str]:
    return [name for name, is_chosen in zip(ids, chosen, strict=True) if is_chosen]


def _live(model: SafetyModel, packed: Pack) -> Tensor:
    states = model.hidden(packed)[0, packed.supervised]
    ordinary = model.vocabulary_logits(states)[:, : model.vocab_size]
    return torch.cat([ordinary, model.verdict_logits(states)], dim=1)


def _collected(
    prompts: Sequence[PackedSequence], vocabulary: int, forward: Callable[[Pack], Tensor]
) -> Outputs:
    verdicts = np.zeros((len(prompts), 3))
    ordinary = np.zeros((len(prompts), vocabulary), dtype=np.float32)
    with torch.no_grad():
        for indices in _batches(prompts):
            logits: Tensor = forward(pack([prompts[i] for i in indices], torch.device("cpu")))
            rows = logits.float().numpy()
            ordinary[indices] = rows[:, :vocabulary]
            verdicts[indices] = rows[:, vocabulary : vocabulary + 3]
    return Outputs(_softmax(verdicts), ordinary)


def _batches(prompts: Sequence[PackedSequence]) -> Iterator[list[int]]:
    batch: list[int] = []
    tokens = 0
    for i in sorted(range(len(prompts)), key=lambda i: len(prompts[i].own)):
        if batch and tokens + len(prompts[i].own) > _TOKENS_PER_FORWARD:
            yield batch
            batch, tokens = [], 0
        batch.append(i)
        tokens += len(prompts[i].own)
    yield batch


def _check_ids(
    file: str, backend: Backend, calibration: CalibrationSet, tokenizer: HfTokenizer
) -> None:
    for case, expected in zip(calibration.cases, calibration.ids, strict=True):
        found = tokenizer.protocol.prompt_ids(case.conversation, case.policy, backend.tokenize).ids
        if found != expected:
            pairs = zip(expected, found, strict=False)
            shorter = min(len(expected), len(found))
            at = next((i for i, (a, b) in enumerate(pairs) if a != b), shorter)
            raise ExportError(
                f"{file}: its tokenizer differs from the base's on case {case.id!r} at "
                f"token {at}: verdicts would differ; export with --format hf, or use another base"
            )


def _softmax(logits: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: npt.NDArray[np.float64] = shifted / shifted.sum(axis=1, keepdims=True)
    return shares

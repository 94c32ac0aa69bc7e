"""PyTorch on a merged directory: equals transformers' own forward, batched, single, warm or cold."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from support.tiny_hf_export import VERDICT_IDS, make_tiny_export

from so8t_eval.backends.base import Backend, Logits
from so8t_eval.backends.registry import ModelSpec, open_backend
from so8t_eval.backends.torch_backend import TorchBackend
from so8t_eval.backends.torch_hf import open_hf_dir
from so8t_eval.cases import Message
from so8t_eval.errors import BackendError, ModelFileError
from so8t_eval.labels import VERDICT_TOKENS

TOLERANCE = 2e-4
"""Float32 sums in another order, on logits of scale 2."""
TEXTS = ["hello", "the other", "the thing", "the", "い" * 30, "x" * 100, "hello", "a\0b"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_export(tmp_path_factory.mktemp("hf") / "tiny")


@pytest.fixture
def backend(directory: Path) -> Iterator[TorchBackend]:
    opened = open_hf_dir(directory, threads=1, batch_tokens=96)
    yield opened
    opened.close()


def prompts(backend: Backend, texts: list[str] = TEXTS) -> list[list[int]]:
    policies = [None, "a long policy for the other"]
    return [
        backend.protocol.prompt_ids(
            [Message(role="user", content=text)], policy, backend.tokenize
        ).ids
        for text in texts
        for policy in policies
    ]


def difference(a: list[Logits], b: list[Logits]) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def batched(backend: Backend, ids: list[list[int]]) -> list[Logits]:
    outcomes = list(backend.score(ids))
    assert sorted(index for index, _ in outcomes) == list(range(len(ids)))
    return [logits for _, logits in sorted(outcomes)]


def plain_logits(directory: Path, ids: list[list[int]]) -> list[Logits]:
    """What transformers computes by itself, prompt by prompt."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        rows = [model(torch.tensor([prompt])).logits[0, -1, VERDICT_IDS] for prompt in ids]
    return [Logits(*row.tolist()) for row in rows]


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("tied", [True, False])
def test_batches_and_singles_equal_transformers(tmp_path: Path, family: str, tied: bool) -> None:
    path = make_tiny_export(tmp_path / "m", family, tied=tied)  # type: ignore[arg-type]
    backend = open_hf_dir(path, threads=1, batch_tokens=96)
    ids = prompts(backend)
    expected = plain_logits(path, ids)
    assert np.ptp(np.array(expected), axis=0).min() > 0.1  # different prompts do differ
    assert difference(batched(backend, ids), expected) < TOLERANCE
    assert difference([backend.score_single(p, cold=True) for p in ids], expected) < TOLERANCE
    assert difference([backend.score_single(p) for p in ids], expected) < TOLERANCE


def test_sliding_window_and_softcap_are_obeyed(tmp_path: Path) -> None:
    path = make_tiny_export(tmp_path / "m")
    torch.manual_seed(3)
    config = transformers.Gemma2Config(
        vocab_size=451, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=16,
        max_position_embeddings=512, attn_logit_softcapping=5.0, final_logit_softcapping=3.0,
    )  # fmt: skip
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(path)
    backend = open_hf_dir(path, threads=1, batch_tokens=96)
    ids = prompts(backend)
    with torch.no_grad():
        rows = [model.eval()(torch.tensor([p])).logits[0, -1, VERDICT_IDS] for p in ids]
    expected = [Logits(*row.tolist()) for row in rows]
    assert np.abs(np.array(expected)).max() < 3
    assert difference(batched(backend, ids), expected) < TOLERANCE
    assert difference([backend.score_single(p) for p in ids], expected) < TOLERANCE


def test_neighbours_and_order_do_not_matter(backend: TorchBackend) -> None:
    ids = prompts(backend)
    forward = batched(backend, ids)
    assert difference(batched(backend, ids[::-1])[::-1], forward) < TOLERANCE
    assert difference(batched(backend, ids[:2]), forward[:2]) < TOLERANCE
    assert difference(batched(backend, ids[5:6]), forward[5:6]) < TOLERANCE


def test_scores_survive_an_abandoned_iteration(backend: TorchBackend) -> None:
    ids = prompts(backend)
    expected = batched(backend, ids)
    iterator = backend.score(ids)
    next(iterator)
    single = backend.score_single(ids[0])
    rest = dict(iterator)
    assert difference([single], expected[:1]) < TOLERANCE
    assert difference([rest[i] for i in rest], [expected[i] for i in rest]) < TOLERANCE


def test_long_prompts_are_judged_whole_or_refused(backend: TorchBackend, directory: Path) -> None:
    vocabulary = torch.randint(3, 400, (2048,), generator=torch.Generator().manual_seed(0))
    long = vocabulary.tolist()
    assert difference([backend.score_single(long)], plain_logits(directory, [long])) < TOLERANCE
    assert difference(batched(backend, [long, long[:100]]), plain_logits(directory, [long, long[:100]])) < TOLERANCE  # fmt: skip  # noqa: E501
    for wrong in ([], [*long, 5]):
        with pytest.raises(BackendError, match="does not fit"):
            backend.score_single(wrong)
        with pytest.raises(BackendError, match="does not fit"):
            list(backend.score([[5], wrong]))


def test_max_prompt_tokens_is_bounded_by_the_model(directory: Path) -> None:
    assert open_hf_dir(directory, max_prompt_tokens=64).max_prompt_tokens == 64
    assert open_hf_dir(directory, max_prompt_tokens=10**6).max_prompt_tokens == 2048


def greedy_text(backend: TorchBackend, directory: Path, ids: list[int], verdict: int) -> str:
    """The reply by transformers, recomputing everything for every token."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    row = [*ids, VERDICT_IDS[verdict]]
    answer: list[int] = []
    with torch.no_grad():
        while len(answer) < 20:
            logits = model(torch.tensor([row + answer])).logits[0, -1]
            logits[VERDICT_IDS] = -torch.inf
            token = int(logits.argmax())
            if token < 3:  # the three control tokens
                break
            answer.append(token)
    return backend._tokenizer.decode(answer)


def test_reply_follows_the_verdict_and_reuses_the_prefill(
    backend: TorchBackend, directory: Path
) -> None:
    first, second, *_ = prompts(backend)
    replies = []
    for verdict in range(3):
        backend.score_single(first)
        replies.append("".join(backend.reply(first, verdict, 20)))
        expected = greedy_text(backend, directory, first, verdict)
        assert replies[-1] == expected.rstrip("\ufffd")
    backend.score_single(second, cold=True)
    assert "".join(backend.reply(first, 2, 20)) == replies[2]
    assert any(replies)
    assert len(set(replies)) > 1
    assert not any("so8t" in text for text in replies)


def test_reply_leaves_later_scores_as_they_were(backend: TorchBackend) -> None:
    ids = prompts(backend)
    before = [backend.score_single(p, cold=True) for p in ids[:2]]
    list(backend.reply(ids[1], 0, 10))
    assert difference([backend.score_single(p) for p in ids[:2]], before) < TOLERANCE


def test_reply_ends_at_the_end_token_and_at_the_context(directory: Path, tmp_path: Path) -> None:
    backend = open_hf_dir(directory, threads=1)
    long = [5] * 2040
    backend.score_single(long)
    assert len("".join(backend.reply(long, 0, 100)).split()) <= 7
    path = shutil.copytree(directory, tmp_path / "ending")
    config = json.loads((path / "config.json").read_text())
    config["eos_token_id"] = list(range(448))
    (path / "config.json").write_text(json.dumps(config))
    ending = open_hf_dir(path, threads=1)
    assert list(ending.reply(prompts(ending)[0], 1, 20)) == []


def test_special_tokens_only_when_asked(backend: TorchBackend) -> None:
    for name, token in zip(VERDICT_TOKENS, VERDICT_IDS, strict=True):
        assert backend.tokenize(name, True) == [token]
        assert token not in backend.tokenize(name, False)
        assert backend.piece(token) == name


def test_registry_opens_the_directory(directory: Path) -> None:
    backend = open_backend(ModelSpec("torch", directory), threads=1, batch_tokens=64)
    assert backend.info.backend == "torch"
    assert backend.info.model == "tiny"
    assert backend.info.settings["batch_tokens"] == 64
    assert backend.info.settings["dtype"] == "float32"


def test_hash_covers_every_file_that_shapes_a_verdict(directory: Path, tmp_path: Path) -> None:
    hashes = {open_hf_dir(directory).info.model_sha256}
    for name in ("config.json", "tokenizer_config.json", "so8t_model.json"):
        path = shutil.copytree(directory, tmp_path / name)
        (path / name).write_text((path / name).read_text() + "\n")
        hashes.add(open_hf_dir(path).info.model_sha256)
    assert len(hashes) == 4


def test_closed_backend_says_so(directory: Path) -> None:
    backend = open_hf_dir(directory)
    backend.close()
    backend.close()
    with pytest.raises(BackendError, match="is closed"):
        backend.score_single([5])


def broken(source: Path, target: Path, name: str, content: bytes | None) -> Path:
    path = shutil.copytree(source, target)
    if content is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes(content)
    return path


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("so8t_model.json", None, "no so8t_model.json"),
        ("so8t_model.json", b"{", "cannot be read"),
        ("so8t_model.json", b'{"format_version": 2}', "expected format_version 1, found 2"),
        ("config.json", None, "missing config.json"),
        ("config.json", b"{}", "cannot be loaded"),
        ("tokenizer.json", None, "missing tokenizer.json"),
        ("tokenizer.json", b"[]", "cannot be read"),
        ("model.safetensors", None, "missing *.safetensors"),
        ("model.safetensors", b"", "cannot be loaded"),
        ("chat_template.jinja", b"{{ messages[0]['content'] }}", "the model was trained with"),
    ],
)
def test_broken_directory_says_what_to_do(
    directory: Path, tmp_path: Path, name: str, content: bytes | None, problem: str
) -> None:
    path = broken(directory, tmp_path / "broken", name, content)
    with pytest.raises(ModelFileError) as caught:
        open_hf_dir(path)
    assert problem in str(caught.value)
    assert any(word in str(caught.value) for word in ("export", "copy", "save"))


def test_verdict_ids_must_be_those_of_the_tokenizer(tmp_path: Path) -> None:
    path = make_tiny_export(tmp_path / "m", verdict_token_ids=[450, 449, 448])
    with pytest.raises(
        ModelFileError, match=r"expected verdict token .* at id 450, found it at 448"
    ):
        open_hf_dir(path)


def test_missing_tensors_are_not_made_up(directory: Path, tmp_path: Path) -> None:
    path = shutil.copytree(directory, tmp_path / "m")
    config = json.loads((path / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelFileError, match="the weights lack or misfit"):
        open_hf_dir(path)

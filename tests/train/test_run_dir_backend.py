"""The live backend: equals the trained model's own forward, with its gates, 8-bit base and rows."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tiny_run import make_tiny_run

from so8t_eval.backends.base import Backend, Logits
from so8t_eval.cases import Message
from so8t_eval.errors import ModelFileError
from so8t_train import cpu_lora
from so8t_train.quantized_layers import use_training_kernels
from so8t_train.run_dir import PARTS, load_run
from so8t_train.run_dir_backend import open_run_dir

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

TOLERANCE = 2e-4
"""Float32 sums in another order, on logits of scale 2."""
TEXTS = ["hello", "the other", "the thing", "the", "い" * 30, "x" * 100, "hello", "a\0b"]


@pytest.fixture(scope="module")
def run_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_run(tmp_path_factory.mktemp("tiny"))


def prompts(backend: Backend) -> list[list[int]]:
    policies = [None, "a long policy for the other"]
    return [
        backend.protocol.prompt_ids(
            [Message(role="user", content=text)], policy, backend.tokenize
        ).ids
        for text in TEXTS
        for policy in policies
    ]


def batched(backend: Backend, ids: list[list[int]]) -> list[Logits]:
    outcomes = list(backend.score(ids))
    assert sorted(index for index, _ in outcomes) == list(range(len(ids)))
    return [logits for _, logits in sorted(outcomes)]


def difference(a: list[Logits], b: list[Logits]) -> float:
    return float(np.abs(np.array(a) - np.array(b)).max())


def trained_logits(directory: Path, ids: list[list[int]]) -> list[Logits]:
    """Each prompt alone through the loaded run, plain causal attention, gates from generators."""
    model = load_run(directory).model
    use_training_kernels(model)
    rows = []
    with torch.no_grad():
        for prompt in ids:
            embedded = model.embed(torch.tensor([prompt]))
            states = model.base.get_decoder()(inputs_embeds=embedded).last_hidden_state
            rows.append(Logits(*model.verdict_logits(states[0, -1:])[0].tolist()))
    return rows


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"load_in_8bit": False},
        {"load_in_8bit": False, "load_in_4bit": True},
        {"rotation_gates": False},
        {"tied": False},
    ],
    ids=["8-bit", "float", "4-bit", "no-gates", "untied"],
)
def test_batches_and_singles_equal_the_trained_model(
    tmp_path: Path, changes: dict[str, bool]
) -> None:
    directory = make_tiny_run(tmp_path, **changes)  # type: ignore[arg-type]
    backend = open_run_dir(directory, threads=1, batch_tokens=96)
    ids = prompts(backend)
    expected = trained_logits(directory, ids)
    assert np.ptp(np.array(expected), axis=0).min() > 0.1  # different prompts do differ
    assert difference(batched(backend, ids), expected) < TOLERANCE
    assert difference([backend.score_single(p, cold=True) for p in ids], expected) < TOLERANCE
    assert difference([backend.score_single(p) for p in ids], expected) < TOLERANCE


def test_held_weights_are_those_of_the_training_kernel(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = open_run_dir(run_directory, threads=1)
    monkeypatch.setattr(cpu_lora, "MOST_MEMORY_SHARE", 0.0)
    fresh = open_run_dir(run_directory, threads=1)
    assert held.info.settings["weights"] == "8-bit base, dequantized once"
    assert fresh.info.settings["weights"] == "8-bit base, dequantized in every pass"
    ids = prompts(held)
    assert difference(batched(held, ids), batched(fresh, ids)) < 1e-5
    assert held.info.model_sha256 == fresh.info.model_sha256


def test_gates_and_temperature_reach_the_verdict(tmp_path: Path) -> None:
    directory = make_tiny_run(tmp_path / "a")
    plain = open_run_dir(make_tiny_run(tmp_path / "b", rotation_gates=False), threads=1)
    warm = open_run_dir(make_tiny_run(tmp_path / "c", temperature=3.0), threads=1)
    backend = open_run_dir(directory, threads=1)
    ids = prompts(backend)[:4]
    logits = batched(backend, ids)
    assert difference(batched(plain, ids), logits) > 0.05
    halved = [Logits(*(value / 2 for value in row)) for row in logits]
    assert difference(batched(warm, ids), halved) < TOLERANCE
    assert backend.info.settings["rotation_gates"] is True
    assert plain.info.settings["rotation_gates"] is False


def test_reply_starts_after_the_verdict(run_directory: Path) -> None:
    backend = open_run_dir(run_directory, threads=1)
    model = load_run(run_directory).model
    use_training_kernels(model)
    ids = prompts(backend)[1]
    for verdict in range(3):
        row = [*ids, model.verdict_ids[verdict]]
        with torch.no_grad():
            for _ in range(6):
                embedded = model.embed(torch.tensor([row]))
                states = model.base.get_decoder()(inputs_embeds=embedded).last_hidden_state
                logits = model.vocabulary_logits(states[0, -1:])[0]
                logits[list(model.verdict_ids)] = -torch.inf
                row.append(int(logits.argmax()))
        answer = list(row[len(ids) + 1 :])
        ended = next((i for i, token in enumerate(answer) if token < 3), len(answer))
        backend.score_single(ids)
        text = "".join(backend.reply(ids, verdict, 6))
        assert text == backend._tokenizer.decode(answer[:ended]).rstrip("\ufffd")


def test_settings_say_how_the_model_runs(run_directory: Path) -> None:
    backend = open_run_dir(run_directory, threads=1, max_prompt_tokens=128)
    assert backend.info.backend == "torch"
    assert backend.info.model == "run"
    assert backend.max_prompt_tokens == 128
    assert backend.info.settings["threads"] == 1
    assert backend.info.settings["dtype"] == "float32"


@pytest.mark.parametrize("part", PARTS[1:])
def test_incomplete_or_altered_run_is_refused(
    run_directory: Path, tmp_path: Path, part: str
) -> None:
    path = shutil.copytree(run_directory, tmp_path / "run")
    (path / part).write_bytes((path / part).read_bytes() + b" ")
    with pytest.raises(ModelFileError, match="was altered after training"):
        open_run_dir(path)
    (path / part).unlink()
    with pytest.raises(ModelFileError, match="not a complete run: missing"):
        open_run_dir(path)


def test_hash_follows_every_part(run_directory: Path, tmp_path: Path) -> None:
    path = shutil.copytree(run_directory, tmp_path / "run")
    before = open_run_dir(path, threads=1).info.model_sha256
    manifest = json.loads((path / "so8t.json").read_text())
    manifest["temperature"] = 2.0
    (path / "so8t.json").write_text(json.dumps(manifest))
    assert open_run_dir(path, threads=1).info.model_sha256 != before

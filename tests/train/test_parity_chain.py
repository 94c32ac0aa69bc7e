"""One model in every form: live adapter, merged weights, Hugging Face directory, GGUF.

Tolerances are for verdict probabilities; the models are random with large rotations (up to a half
turn), which is harder than anything training reaches.
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.export_run import calibration_file, make_base, make_run
from support.tiny_hf import Family

from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_train.base_model import EMBEDDED
from so8t_train.calibration import load_calibration, merged_model
from so8t_train.certificate import Certificate
from so8t_train.export import ExportOptions, export
from so8t_train.merged_model import merged_weights, open_run
from so8t_train.packing import PackedSequence, pack
from so8t_train.run_dir import load_run

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

LIVE_TO_MERGED = 1e-5
MERGED_TO_F32 = 1e-5
MERGED_TO_F16 = 1e-2
MERGED_TO_HF = 1e-5
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _differences(certificate: Certificate) -> dict[str, float]:
    return {file.format: file.difference.max_probability_difference for file in certificate.files}


@pytest.mark.parametrize(
    ("family", "tied", "changes"),
    [
        ("llama", True, {}),
        ("llama", False, {"attention_bias": True, "rope_parameters": LLAMA3_ROPE}),
        ("qwen2", True, {"rope_parameters": {"rope_type": "default", "rope_theta": 5e4}}),
        ("qwen2", False, {}),
        ("qwen3", True, {"head_dim": 32}),
        ("qwen3", False, {}),
    ],
)
def test_every_form_gives_the_same_verdicts(
    family: Family, tied: bool, changes: dict[str, Any], tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", family, tied=tied, spare_rows=0 if tied else 5, **changes)
    run = make_run(tmp_path / "run", base, rotation_std=1.0)
    options = ExportOptions(quants="f32,f16", calibration=calibration_file(tmp_path), threads=1)
    certificate = export(run, tmp_path / "gguf", options).certificate
    for variant in certificate.merge_bases.values():
        assert variant.fold.max_probability_difference < LIVE_TO_MERGED
    as_trained = certificate.merge_bases["dequant8"].from_trained
    assert as_trained.max_probability_difference < LIVE_TO_MERGED
    found = _differences(certificate)
    assert found["F32"] < MERGED_TO_F32
    assert found["F16"] < MERGED_TO_F16
    hf = options._replace(format="hf", quants="f32")
    assert _differences(export(run, tmp_path / "hf", hf).certificate)["F32"] < MERGED_TO_HF


@pytest.mark.parametrize(("tied", "temperature"), [(True, 1.0), (False, 1.7)])
def test_a_reply_goes_on_after_the_verdict_as_in_training(
    tied: bool, temperature: float, tmp_path: Path
) -> None:
    """The verdict token read as input: the same next-token logits live and merged."""
    base = make_base(tmp_path / "base", "qwen3", tied=tied)
    directory = make_run(
        tmp_path / "run", base, load_in_8bit=False, temperature=temperature, rotation_std=1.0
    )
    run = open_run(directory)
    live = load_run(directory).model
    plain: Any = merged_model(live.base, merged_weights(run, "original"))
    prompt = run.tokenizer.tokenize("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n", True)
    for verdict in run.verdict_ids:
        own = (*prompt, verdict)
        packed = pack([PackedSequence((), own, len(own) - 1, (0,))], live.device)
        with torch.no_grad():
            expected = live.vocabulary_logits(live.hidden(packed)[0, -1:])[0, : live.vocab_size]
            found = plain(input_ids=torch.tensor([own])).logits[0, -1, : live.vocab_size]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_a_tied_temperature_keeps_the_rows_mean(tmp_path: Path) -> None:
    """What it costs a tied model: the rows differ less from one another, and nothing else."""
    base = make_base(tmp_path / "base", "llama", tied=True)
    run = open_run(make_run(tmp_path / "run", base, load_in_8bit=False, temperature=2.0))
    rows = merged_weights(run, "original")["model.embed_tokens.weight"][-3:]
    trained = run.adapter.verdict_rows
    torch.testing.assert_close(rows.mean(dim=0), trained.mean(dim=0))
    torch.testing.assert_close(rows[0] - rows[1], (trained[0] - trained[1]) / 2)


def test_smollm2_in_every_form(tmp_path: Path) -> None:
    """The embedded base, from its Q4_1 GGUF, with rotations ten times what training reaches.

    Random rotations of 0.3 and more scramble this model until 16-bit rounding is amplified past any
    useful tolerance (0.02 in probability).
    """
    run = make_run(tmp_path / "run", EMBEDDED, rotation_std=0.03, lora_std=0.01)
    options = ExportOptions(
        quants="f32,f16", calibration=calibration_file(tmp_path, n=6), threads=1
    )
    certificate = export(run, tmp_path / "out", options).certificate
    assert len(certificate.layers) == 30
    assert min(layer.commutator_mean for layer in certificate.layers) > 1e-3
    for variant in certificate.merge_bases.values():
        assert variant.fold.max_probability_difference < 1e-4
        assert variant.fold_logit_difference < 1e-5
    found = _differences(certificate)
    assert found["F32"] < MERGED_TO_F32
    assert found["F16"] < MERGED_TO_F16
    opened = open_run(run)
    backend = LlamaCppBackend(tmp_path / "out" / "model-F16.gguf", threads=1, exact=True)
    calibration = load_calibration(tmp_path / "calibration.jsonl", 6, opened.tokenizer)
    assert backend.protocol.hash == opened.manifest.protocol_hash
    logits = np.array([three for _, three in sorted(backend.score(calibration.ids))])
    assert logits.shape == (6, 3)
    assert np.ptp(logits, axis=1).min() > 0
    backend.close()

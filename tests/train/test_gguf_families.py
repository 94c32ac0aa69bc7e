"""Every family in every form; settings that llama.cpp would compute otherwise are refused by name."""

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import transformers
from click.testing import CliRunner
from support.export_run import calibration_file, make_base, make_run
from support.tiny_fit import QUIET, fit_config
from support.tiny_hf import Family, make_tiny_model
from torch import Tensor, nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.errors import ExportError
from so8t_train.base_model import resolve_base
from so8t_train.base_weights import BaseWeights, read_base_weights
from so8t_train.calibration import (
    backend_outputs,
    difference,
    live_outputs,
    load_calibration,
    merged_model,
    merged_outputs,
)
from so8t_train.cli import main
from so8t_train.export import ExportOptions, export
from so8t_train.families import FAMILIES
from so8t_train.fit import fit
from so8t_train.float_files import facts_of
from so8t_train.gguf_export import write_gguf
from so8t_train.gguf_layout import HeadCounts, gguf_name, hf_name, to_gguf_layout, to_hf_layout
from so8t_train.gguf_rope import add_rope
from so8t_train.gguf_settings import context_length, settings_of
from so8t_train.merged_model import merged_weights, open_run
from so8t_train.run_dir import load_run

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

EXACT, F16 = 1e-5, 1e-2
TABLE_GELU = 1e-3
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0, 1.1, 1.3, 1.5, 1.9, 2.0, 2.5, 3.0],
    "long_factor": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0],
    "original_max_position_embeddings": 128,
    "factor": 16.0,
    "partial_rotary_factor": 1.0,
}
LONG: dict[str, Any] = {"rope_parameters": LONGROPE, "original_max_position_embeddings": 128}
HALF_ROTATED = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}


@pytest.mark.parametrize(
    ("family", "tied", "changes"),
    [
        ("mistral", False, {"sliding_window": 100}),
        ("phi3", False, LONG),
        ("phi3", True, {"rope_parameters": HALF_ROTATED, "sliding_window": 100}),
        ("smollm3", True, {}),
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
        assert variant.fold.max_probability_difference < EXACT
    found = {file.format: file.difference.max_probability_difference for file in certificate.files}
    assert found["F32"] < EXACT
    assert found["F16"] < F16
    hf = options._replace(format="hf", quants="f32")
    files = export(run, tmp_path / "hf", hf).certificate.files
    assert files[0].difference.max_probability_difference < EXACT


class _TableGelu(nn.Module):
    """GELU as llama.cpp's processor code has it: a table from half precision to half precision."""

    def forward(self, x: Tensor) -> Tensor:
        rounded = nn.functional.gelu(x.half().float(), approximate="tanh").half().float()
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, rounded))


@pytest.mark.parametrize("family", ["gemma3_text", "gemma2"])
def test_gemma_in_every_form(family: Family, tmp_path: Path) -> None:
    """Windows of 24 tokens are shorter than the prompts; the only difference is GELU's rounding."""
    base = make_base(tmp_path / "base", family)
    directory = make_run(
        tmp_path / "run", base, rotation_std=1.0, temperature=1.0, load_in_8bit=False
    )
    run = open_run(directory)
    weights = merged_weights(run, "original")
    cases = load_calibration(calibration_file(tmp_path), 6, run.tokenizer)
    assert max(map(len, cases.ids)) > 2 * 24
    live = load_run(directory).model
    said = live_outputs(live, cases.prompts)
    plain: Any = merged_model(live.base, weights)
    merged = merged_outputs(plain, cases.prompts, run.base.vocab_size)
    names = [case.id for case in cases.cases]
    assert difference(said, merged, names).max_probability < EXACT
    for layer in plain.model.layers:
        layer.mlp.act_fn = _TableGelu()
    rounded = merged_outputs(plain, cases.prompts, run.base.vocab_size)
    for kind, most in (("f32", TABLE_GELU), ("f16", 2 * F16)):
        path = tmp_path / f"{kind}.gguf"
        write_gguf(path, run, weights, kind, facts_of(run))  # type: ignore[arg-type]
        backend = LlamaCppBackend(path, threads=1, exact=True)
        file = backend_outputs(backend, path.name, cases, run.tokenizer)
        assert difference(rounded, file, names).max_probability < most


def test_a_temperature_before_a_softcap_is_refused(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "gemma2")
    run = make_run(tmp_path / "run", base, load_in_8bit=False, temperature=1.4)
    with pytest.raises(ExportError, match=r"expected temperature 1 for gemma2.*found 1\.400"):
        open_run(run)


@pytest.mark.parametrize("family", get_args(Family))
def test_every_weight_has_a_name_and_a_way_back(family: Family, tmp_path: Path) -> None:
    base = read_base_weights(resolve_base(str(make_tiny_model(tmp_path / "base", family))))
    for name, weight in base.weights.items():
        own = gguf_name(name, family)
        assert own is not None
        assert hf_name(own, family) == name
        there = to_gguf_layout(name, weight, family, HeadCounts(4, 2))
        torch.testing.assert_close(to_hf_layout(name, there, family, HeadCounts(4, 2)), weight)
    assert set(get_args(Family)) == set(FAMILIES)


def test_a_fit_of_a_softcapped_model_keeps_the_temperature_that_can_be_exported(
    tmp_path: Path,
) -> None:
    base = make_base(tmp_path / "base", "gemma2")
    result = fit(fit_config(tmp_path, base, max_steps=1), resume=False, reporter=QUIET)
    assert result.temperature == 1.0
    assert open_run(result.directory).base.architecture == "gemma2"


def test_the_names_of_gemmas_norms_are_not_those_of_llama() -> None:
    name = "model.layers.0.post_attention_layernorm.weight"
    assert gguf_name(name) == "blk.0.ffn_norm.weight"
    assert gguf_name(name, "gemma3_text") == "blk.0.post_attention_norm.weight"


@pytest.mark.parametrize(
    ("family", "changes", "field"),
    [
        ("llama", {"logits_scaling": 8.0}, "logits_scaling"),
        ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("qwen3", {"attention_bias": True}, "attention_bias"),
        ("qwen2", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ("qwen2", {"rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}, "dynamic"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar"),
        ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping"),
        ("gemma2", {"hidden_activation": "gelu"}, "hidden_activation"),
        ("gemma3_text", {"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("gemma3_text", {"layer_types": ["full_attention"] * 7}, "layer_types"),
        (
            "gemma3_text",
            {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 7.0}}},
            "sliding_attention",
        ),
        ("smollm3", {"no_rope_layers": [1] * 5}, "no_rope_layers"),
        ("mistral", {"rope_parameters": {"rope_type": "default", "mscale": 2.0}}, "mscale"),
        ("phi3", {"model_type": "granite"}, "granite"),
    ],
)
def test_settings_that_change_the_model_are_refused_by_name(
    family: Family, changes: dict[str, Any], field: str, tmp_path: Path
) -> None:
    base = _edited(make_tiny_model(tmp_path / "base", family), changes)
    with pytest.raises(ExportError, match=f"{field}.*--format hf"):
        settings_of(base)


def test_settings_that_change_nothing_are_accepted(tmp_path: Path) -> None:
    changes = {"pretraining_tp": 2, "unsloth_version": "2026", "logits_scaling": None}
    settings = settings_of(_edited(make_tiny_model(tmp_path / "base"), changes))
    assert context_length(settings) == 2048


def test_the_context_ends_where_llama_cpp_and_transformers_part(tmp_path: Path) -> None:
    windowed = _edited(make_tiny_model(tmp_path / "mistral", "mistral"), {"sliding_window": 96})
    assert context_length(settings_of(windowed)) == 96
    longrope = _edited(make_tiny_model(tmp_path / "phi3", "phi3"), LONG)
    assert context_length(settings_of(longrope)) == 128


@pytest.mark.parametrize("factor", [16.0, None])
def test_longrope_scales_attention_as_transformers_does(
    factor: float | None, tmp_path: Path
) -> None:
    changes = LONG | {"rope_parameters": LONGROPE | {"factor": factor}}
    base = _edited(make_tiny_model(tmp_path / "phi3", "phi3"), changes)
    config = transformers.AutoConfig.from_pretrained(base.source.path)
    _, expected = ROPE_INIT_FUNCTIONS["longrope"](config, torch.device("cpu"))
    written: dict[str, float] = {}

    class Writer:
        def __getattr__(self, name: str) -> Any:
            return lambda value: written.__setitem__(name, value)

    add_rope(Writer(), settings_of(base))  # type: ignore[arg-type]
    assert written["add_rope_scaling_attn_factors"] == pytest.approx(expected)
    assert expected > 1.1


def test_the_command_lists_the_table() -> None:
    plain = CliRunner().invoke(main, ["families"])
    assert plain.exit_code == 0
    for family in FAMILIES.values():
        assert family.title in plain.output
        assert f"{family.model_type} ({family.hf_class})" in plain.output
    listed = json.loads(CliRunner().invoke(main, ["families", "--json"]).output)
    assert [entry["model_type"] for entry in listed] == list(FAMILIES)


@pytest.mark.parametrize("family", list(FAMILIES.values()))
def test_the_table_names_classes_that_transformers_has(family: Any) -> None:
    config = transformers.AutoConfig.for_model(family.model_type)
    cls = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    assert cls.__name__ == family.hf_class


def _edited(directory: Path, changes: dict[str, Any]) -> BaseWeights:
    file = directory / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8")
    return read_base_weights(resolve_base(str(directory)))

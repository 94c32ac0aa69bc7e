"""Importance matrices: numbers and names, what they change, and what an export records of them."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from gguf import GGUFReader
from gguf.quants import dequantize
from support.case_files import case_dict, write_cases
from support.export_run import calibration_file, make_base, make_run
from support.tiny_hf import Family
from torch import nn

from so8t_eval.errors import ExportError, UsageError
from so8t_eval.file_hash import file_sha256
from so8t_train import quantization
from so8t_train.calibration import load_calibration, merged_model
from so8t_train.certificate import Certificate
from so8t_train.cli import main
from so8t_train.export import ExportOptions, export
from so8t_train.float_files import facts_of
from so8t_train.gguf_export import write_gguf
from so8t_train.importance import collect_importance
from so8t_train.merged_model import OpenRun, merged_weights, open_run
from so8t_train.quantization import FORMATS, quantize_gguf
from so8t_train.run_dir import load_run

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 features, so that K-quants' blocks are filled."""
    directory = tmp_path_factory.mktemp("importance")
    base = make_base(
        directory / "base", "llama", hidden_size=256, intermediate_size=256, head_dim=64
    )
    return make_run(directory / "run", base, load_in_8bit=False)


@pytest.fixture
def options(tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    directory = tmp_path_factory.mktemp("cases")
    return ExportOptions(
        quants="q4_k_m,q8_0",
        calibration=calibration_file(directory),
        threads=1,
        imatrix=True,
        imatrix_file=_other_cases(directory),
    )


def _other_cases(directory: Path, n: int = 12) -> Path:
    cases = [case_dict(i, prompt=f"Please ask a person about file {i}.") for i in range(n)]
    return write_cases(directory / "other.jsonl", cases)


def _merged(run: OpenRun, directory: Path) -> Any:
    return merged_model(load_run(directory).model.base, dict(merged_weights(run, "original")))


def _plain_squares(model: Any, ids: list[int], module: str) -> np.ndarray:
    """Squared inputs (tokens, channels) of one layer in an ordinary transformers pass."""
    found: list[torch.Tensor] = []
    layer = model.get_submodule(module)
    handle = layer.register_forward_hook(lambda _m, inputs, _o: found.append(inputs[0][0]))
    with torch.no_grad():
        model(torch.tensor([ids]))
    handle.remove()
    return np.asarray(found[0].numpy(), dtype=np.float64) ** 2


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_the_numbers_are_those_of_a_plain_computation(
    share: float, run: Path, tmp_path: Path
) -> None:
    opened = open_run(run)
    cases = load_calibration(_other_cases(tmp_path), 5, opened.tokenizer)
    model = _merged(opened, run)
    modules = [f"model.layers.1.{m}" for m in ("self_attn.q_proj", "self_attn.o_proj")]
    modules.append("model.layers.1.mlp.down_proj")
    plain = {m: [_plain_squares(model, ids, m) for ids in cases.ids] for m in modules}
    found = collect_importance(model, cases.whole_prompts, "llama", share)
    assert (found.prompts, found.tokens) == (5, sum(map(len, cases.ids)))
    names = ("attn_q", "attn_output", "ffn_down")
    for module, name in zip(modules, names, strict=True):
        squares = plain[module]
        expected = (1 - share) * np.concatenate(squares).mean(axis=0)
        expected += share * np.mean([rows[-1] for rows in squares], axis=0)
        values = found.values[f"blk.1.{name}.weight"]
        assert values.dtype == np.float32
        np.testing.assert_allclose(values, expected, rtol=1e-4)
    shared = [found.values[f"blk.0.attn_{name}.weight"] for name in "qkv"]
    assert np.array_equal(shared[0], shared[1])
    assert np.array_equal(shared[0], shared[2])


@pytest.mark.parametrize("family", get_args(Family))
def test_every_quantized_tensor_has_an_entry_of_its_width(family: Family, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", family, tied=family != "mistral")
    directory = make_run(tmp_path / "run", base, load_in_8bit=False, temperature=1.0)
    opened = open_run(directory)
    cases = load_calibration(_other_cases(tmp_path), 2, opened.tokenizer)
    model = _merged(opened, directory)
    found = collect_importance(model, cases.whole_prompts, opened.base.architecture)
    path = tmp_path / "model.gguf"
    write_gguf(path, opened, merged_weights(opened, "original"), "f16", facts_of(opened))
    widths = {
        tensor.name: int(tensor.shape[0])
        for tensor in GGUFReader(path).tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    }
    assert {name: len(values) for name, values in found.values.items()} == widths


@pytest.mark.parametrize("name", ["q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs", "q3_k_m"])
def test_the_weighted_error_is_lower_with_a_matrix(name: str, run: Path, tmp_path: Path) -> None:
    opened = open_run(run)
    wide = tmp_path / "wide.gguf"
    write_gguf(wide, opened, merged_weights(opened, "original"), "f16", facts_of(opened))
    cases = load_calibration(_other_cases(tmp_path), 4, opened.tokenizer)
    matrix = collect_importance(_merged(opened, run), cases.whole_prompts, "llama")
    quantize_gguf(wide, tmp_path / "plain.gguf", FORMATS[name], 1)
    quantize_gguf(wide, tmp_path / "weighted.gguf", FORMATS[name], 1, importance=matrix)
    exact, plain, weighted = (
        _weights(tmp_path / f"{n}.gguf") for n in ("wide", "plain", "weighted")
    )
    for tensor in ("blk.0.attn_q.weight", "blk.1.attn_output.weight", "blk.1.ffn_gate.weight"):
        importance = matrix.values[tensor]
        errors = [
            float((importance * (w[tensor] - exact[tensor]) ** 2).sum()) for w in (plain, weighted)
        ]
        assert errors[1] < errors[0]
    assert np.array_equal(plain["token_embd.weight"], weighted["token_embd.weight"])


def _weights(path: Path) -> dict[str, np.ndarray]:
    return {
        tensor.name: np.asarray(dequantize(tensor.data, tensor.tensor_type), dtype=np.float64)
        for tensor in GGUFReader(path).tensors
    }


def test_the_certificate_says_what_was_quantized_how(
    run: Path, options: ExportOptions, tmp_path: Path
) -> None:
    result = export(run, tmp_path / "with", options)
    text = (result.directory / "certificate.json").read_text(encoding="utf-8")
    certificate = Certificate.model_validate_json(text)
    assert options.imatrix_file is not None
    entry = certificate.importance
    assert entry is not None
    assert (entry.file, entry.sha256) == ("other.jsonl", file_sha256(options.imatrix_file))
    assert (entry.n, entry.left_out, entry.verdict_share) == (12, 0, 0.5)
    assert {file.format: file.importance_matrix for file in certificate.files} == {
        "F16": False,
        "Q4_K_M": True,
        "Q8_0": False,
    }
    plain = export(run, tmp_path / "none", options._replace(imatrix=False, imatrix_file=None))
    assert plain.certificate.importance is None
    hashes = [
        {file.format: file.sha256 for file in one.certificate.files} for one in (result, plain)
    ]
    assert hashes[0]["Q8_0"] == hashes[1]["Q8_0"]
    assert hashes[0]["Q4_K_M"] != hashes[1]["Q4_K_M"]


def test_cases_compared_on_are_not_collected_on(
    run: Path, options: ExportOptions, tmp_path: Path
) -> None:
    same = options._replace(imatrix_file=options.calibration, calibration_cases=5)
    entry = export(run, tmp_path / "out", same).certificate.importance
    assert entry is not None
    assert (entry.n, entry.left_out) == (4, 5)
    with pytest.raises(UsageError, match=r"--imatrix-file .* that are not compared on, found none"):
        export(run, tmp_path / "none", same._replace(calibration_cases=9))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"certificate": "weights"}, "--imatrix: expected with --certificate full"),
        ({"quants": "f16,q8_0"}, r"expected a format that uses one \(q6_k, .*found f16, q8_0"),
        ({"imatrix": False}, "--imatrix-file: expected with --imatrix only"),
    ],
)
def test_a_matrix_that_cannot_be_used_is_an_error(
    changes: dict[str, Any], message: str, run: Path, options: ExportOptions, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match=message):
        export(run, tmp_path / "out", options._replace(**changes))
    assert list(tmp_path.iterdir()) == []


def test_an_old_runtime_is_told_of_before_work(
    run: Path, options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(quantization.c_api, "llama_model_imatrix_data")
    with pytest.raises(ExportError, match="pip install -U llama-cpp-python"):
        export(run, tmp_path / "out", options)


def test_inputs_that_are_not_finite_are_an_error(run: Path, tmp_path: Path) -> None:
    opened = open_run(run)
    cases = load_calibration(_other_cases(tmp_path), 1, opened.tokenizer)
    model = _merged(opened, run)
    nn.init.constant_(model.get_submodule("model.layers.1.mlp.up_proj").weight, float("inf"))
    with pytest.raises(ExportError, match=r"model\.layers\.1\.mlp\.down_proj: expected finite"):
        collect_importance(model, cases.whole_prompts, "llama")


def test_the_command_takes_the_options(run: Path, options: ExportOptions, tmp_path: Path) -> None:
    arguments = ["export", str(run), "-o", str(tmp_path / "out"), "--quant", "q4_0", "--imatrix"]
    arguments += ["--calibration", str(options.calibration), "--threads", "1"]
    arguments += ["--imatrix-file", str(options.imatrix_file), "--imatrix-cases", "3"]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert "importance matrix from 3 cases" in result.stderr

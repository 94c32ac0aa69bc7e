"""The certificate fails, and names the layer or file, for every fault that an export could have."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.export_run import calibration_file, make_base, make_run

from so8t_eval.errors import ExportError, ModelFileError
from so8t_train import export_files, gguf_export, merged_model
from so8t_train.calibration import Difference
from so8t_train.certificate import Tolerances, check, failures, file_checks
from so8t_train.certification import output_residuals, weight_evidence
from so8t_train.export import ExportOptions, export, export_reference_gguf
from so8t_train.float_files import facts_of
from so8t_train.fold import composed_rotations
from so8t_train.gguf_export import write_gguf
from so8t_train.merged_model import merged_weights, open_run
from so8t_train.run_dir import load_run
from so8t_train.so8_rotation import rotation_from_generators
from so8t_train.weight_check import exponential

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

FIRST, SECOND = (f"model.layers.{i}.self_attn.o_proj.weight" for i in range(2))
Rotations = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _swapped(safe: torch.Tensor, command: torch.Tensor) -> torch.Tensor:
    return composed_rotations(command, safe)


def _transposed(safe: torch.Tensor, command: torch.Tensor) -> torch.Tensor:
    return composed_rotations(safe, command).mT


def _second_layer_skipped(safe: torch.Tensor, command: torch.Tensor) -> torch.Tensor:
    composed = composed_rotations(safe, command).clone()
    composed[1] = torch.eye(8)
    return composed


def _layers_exchanged(safe: torch.Tensor, command: torch.Tensor) -> torch.Tensor:
    return composed_rotations(safe, command).flip(0)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("certificate") / "base", "llama")


@pytest.fixture(scope="module")
def run(base: Path) -> Path:
    return make_run(base.parent / "run", base, load_in_8bit=False)


@pytest.fixture(scope="module")
def barely_trained(base: Path) -> Path:
    """Rotations of about 0.02 rad: the two orders of their product differ by 2e-4."""
    return make_run(base.parent / "young", base, load_in_8bit=False, rotation_std=0.003)


@pytest.fixture
def options(tmp_path: Path) -> ExportOptions:
    return ExportOptions(quants="q8_0", calibration=calibration_file(tmp_path), threads=1)


@pytest.mark.parametrize("which", ["run", "barely_trained"])
@pytest.mark.parametrize(
    ("fault", "named", "spared"),
    [
        (_swapped, (FIRST, SECOND), ()),
        (_transposed, (FIRST, SECOND), ()),
        (_second_layer_skipped, (SECOND,), (FIRST,)),
        (_layers_exchanged, (FIRST, SECOND), ()),
    ],
)
def test_a_wrong_fold_fails_and_names_the_layers(
    *,
    which: str,
    fault: Rotations,
    named: tuple[str, ...],
    spared: tuple[str, ...],
    options: ExportOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    directory: Path = request.getfixturevalue(which)
    monkeypatch.setattr(merged_model, "composed_rotations", fault)
    with pytest.raises(ExportError, match="merged weight") as error:
        export(directory, tmp_path / "out", options)
    assert all(name in str(error.value) for name in named)
    assert not any(name in str(error.value) for name in spared)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["certificate.failed.json"]
    failed = json.loads((tmp_path / "out" / "certificate.failed.json").read_text(encoding="utf-8"))
    assert failed["passed"] is False
    assert [item["name"] for item in failed["checks"] if not item["passed"]] == ["merged weight"]
    assert failed["layers"][1]["weight_residual"] > 3e-7


@pytest.mark.parametrize("which", ["run", "barely_trained"])
@pytest.mark.parametrize("fault", [_swapped, _transposed, _second_layer_skipped])
def test_live_layers_alone_reveal_a_wrong_fold(
    which: str,
    fault: Rotations,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    directory: Path = request.getfixturevalue(which)
    live = load_run(directory, merge_base="original").model
    right = output_residuals(live, merged_weights(open_run(directory), "original"))
    assert max(right.values()) < 1e-6
    monkeypatch.setattr(merged_model, "composed_rotations", fault)
    wrong = output_residuals(live, merged_weights(open_run(directory), "original"))
    assert wrong["model.layers.1.self_attn.o_proj"] > Tolerances().layer_output


def test_a_lora_update_left_out_is_named(
    run: Path, options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    missing = "model.layers.1.mlp.up_proj"
    whole = merged_model._read_adapter

    def incomplete(directory: Path) -> merged_model.Adapter:
        adapter = whole(directory)
        del adapter.lora[missing]
        return adapter

    monkeypatch.setattr(merged_model, "_read_adapter", incomplete)
    for level in ("full", "weights"):
        with pytest.raises(ExportError, match=f"{missing}.weight"):
            export(run, tmp_path / level, options._replace(certificate=level))
    with pytest.raises(ExportError, match=missing):
        export_reference_gguf(run, tmp_path / "reference.gguf")
    assert not (tmp_path / "reference.gguf").exists()


def test_verdict_rows_in_another_order_are_named(
    run: Path, options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(merged_model, "calibrated_rows", lambda rows, _t: rows.flip(0))
    with pytest.raises(ExportError, match=r"model\.embed_tokens\.weight"):
        export(run, tmp_path / "out", options)


@pytest.mark.parametrize("part", ["adapter_model.safetensors", "so8t.safetensors"])
def test_a_part_altered_after_training_is_named(
    base: Path, part: str, options: ExportOptions, tmp_path: Path
) -> None:
    directory = make_run(tmp_path / "run", base, load_in_8bit=False)
    content = bytearray((directory / part).read_bytes())
    content[-1] ^= 1
    (directory / part).write_bytes(content)
    with pytest.raises(ModelFileError, match=f"{part} was altered"):
        export(directory, tmp_path / "out", options)
    assert not (tmp_path / "out").exists()


def test_a_gguf_with_wrong_rows_is_named_and_removed(
    run: Path, options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gguf_export, "to_gguf_layout", lambda _name, weight, *_: weight)
    with pytest.raises(ExportError, match=r"F16 probability difference: model-F16\.gguf"):
        export(run, tmp_path / "out", options)
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["certificate.failed.json"]
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.endswith(".tmp")) == []


def test_a_broken_quantization_is_named(
    run: Path, options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Q8_0 file made from other weights, as a faulty quantizer would leave it."""
    other = make_run(tmp_path / "other", open_run(run).manifest.base_model, lora_std=0.5)

    foreign = open_run(other)
    weights = merged_weights(foreign, "original")

    def confused(_source: Path, target: Path, *_: Any, **_options: Any) -> None:
        write_gguf(target, foreign, weights, "f16", facts_of(foreign))

    monkeypatch.setattr(export_files, "quantize_gguf", confused)
    with pytest.raises(ExportError, match=r"Q8_0 mean probability difference: model-Q8_0\.gguf"):
        export(run, tmp_path / "out", options)


def test_the_weight_evidence_lists_every_layer(run: Path) -> None:
    opened = open_run(run)
    evidence = weight_evidence(opened, merged_weights(opened, "original"), "original", Tolerances())
    assert [layer.module for layer in evidence.layers] == opened.gated_modules
    for layer in evidence.layers:
        assert layer.orthogonality < 1e-12
        assert layer.determinant_error < 1e-12
        assert layer.commutator_mean > 0.1
        assert layer.weight_residual < 1e-7
    assert failures(evidence.checks) == []


def test_the_independent_exponential_agrees() -> None:
    rng = torch.Generator().manual_seed(0)
    generators = torch.randn(50, 28, generator=rng, dtype=torch.float64) * 2
    expected = rotation_from_generators(generators).numpy()
    assert abs(exponential(generators.numpy()) - expected).max() < 1e-12


def test_a_check_names_what_fails_and_nan_fails() -> None:
    passed = check("residual", {"a": 1e-8, "b": 2e-8}, 1e-7)
    assert (passed.passed, passed.subject, passed.measured) == (True, "b", 2e-8)
    failed = check("residual", {"a": 1e-8, "b": math.nan, "c": 1.0}, 1e-7)
    assert not failed.passed
    assert failed.subject == "b, c"
    many = check("residual", dict.fromkeys("abcde", 1.0), 0.5)
    assert many.subject == "a, b, c and 2 more"
    assert check("residual", {}, 0.5).passed


def test_a_file_is_held_to_the_tolerance_of_its_format() -> None:
    found = Difference(0.019, 0.0019, ["case"], [])
    assert failures(file_checks("model-F16.gguf", "F16", found, 60, Tolerances())) == []
    assert len(failures(file_checks("model-F32.gguf", "F32", found, 60, Tolerances()))) == 2
    unsafe = found._replace(unsafe_flips=["one"])
    assert len(failures(file_checks("model-F16.gguf", "F16", unsafe, 60, Tolerances()))) == 1
    assert failures(file_checks("model-Q8_0.gguf", "Q8_0", unsafe, 60, Tolerances())) == []
    assert len(failures(file_checks("model-Q8_0.gguf", "Q8_0", unsafe, 40, Tolerances()))) == 1
    lost = Difference(math.inf, math.inf, ["case"], [])
    assert len(failures(file_checks("model-Q4_0.gguf", "Q4_0", lost, 60, Tolerances()))) == 1

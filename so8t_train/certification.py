"""Measure what a certificate states: live against merged model, merged model against files."""

import gc
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from so8t_eval.backends.llamacpp_context import runtime_version
from so8t_eval.file_hash import file_sha256
from so8t_train.base_weights import linear_names
from so8t_train.calibration import (
    CalibrationSet,
    Difference,
    Outputs,
    difference,
    live_outputs,
    merged_model,
    merged_outputs,
    relative_logit_difference,
)
from so8t_train.certificate import (
    CalibrationEntry,
    Certificate,
    CertificateLevel,
    Check,
    FileEntry,
    ImportanceEntry,
    LayerEntry,
    MergeBaseEntry,
    RunEntry,
    Tolerances,
    check,
    difference_entry,
    failures,
    file_checks,
    rotation_checks,
    weight_checks,
)
from so8t_train.config import MergeBase
from so8t_train.gate_installation import attention_outputs
from so8t_train.importance import VERDICT_SHARE, ImportanceMatrix, collect_importance
from so8t_train.lazy_weights import LazyWeights
from so8t_train.merged_model import OpenRun, base_weights, merged_weights
from so8t_train.quantized_layers import use_training_kernels
from so8t_train.run_dir import MANIFEST, load_run, package_versions
from so8t_train.safety_model import SafetyModel
from so8t_train.weight_check import check_rotations, check_weights, read_run_tensors

_PROBE_ROWS: Final = 16
RUNTIME_MODE: Final = "exact: flash attention off, float32 keys and values"


class WeightEvidence(NamedTuple):
    """Checks that need no forward pass: rotations, and every merged tensor recomputed."""

    layers: list[LayerEntry]
    checks: list[Check]


class Variant(NamedTuple):
    """One merge base: its merged weights' outputs, and what was measured against the live model.

    ``importance`` is None where none was collected.
    """

    live: Outputs
    merged: Outputs
    fold: Difference
    fold_logits: float
    layer_outputs: dict[str, float]
    weight_distances: dict[str, float]
    importance: ImportanceMatrix | None = None


class ExportedFile(NamedTuple):
    """A written file, its format's label, and what its runtime says on the calibration cases.

    ``parts`` are in order. ``outputs`` is None where nothing was run. ``importance`` says whether
    the quantizer was given an importance matrix. ``sha256`` (hex) is the first part's, if known.
    """

    parts: list[Path]
    label: str
    kept: bool
    outputs: Outputs | None
    importance: bool = False
    sha256: str | None = None


def weight_evidence(
    run: OpenRun, merged: Mapping[str, Tensor], merge_base: MergeBase, tolerances: Tolerances
) -> WeightEvidence:
    """Recompute every merged tensor from the run's files and compare."""
    tensors = read_run_tensors(run.directory)
    modules = run.gated_modules
    rotations = check_rotations(tensors, modules)
    base = base_weights(run, merge_base)
    weights = check_weights(tensors, base, merged, modules, run.manifest.temperature)
    residuals = {weight.name: weight.residual for weight in weights}
    layers = [
        LayerEntry(
            layer=i,
            module=found.module,
            orthogonality_safe=found.safe_orthogonality,
            orthogonality_command=found.command_orthogonality,
            orthogonality=found.orthogonality,
            determinant_error=found.determinant_error,
            commutator_max=found.commutator_max,
            commutator_mean=found.commutator_mean,
            weight_residual=residuals[f"{found.module}.weight"],
            output_residual={},
        )
        for i, found in enumerate(rotations)
    ]
    checks = [*rotation_checks(rotations, tolerances), weight_checks(weights, tolerances)]
    return WeightEvidence(layers, checks)


def measure_variant(
    run: OpenRun,
    weights: LazyWeights,
    merge_base: MergeBase,
    calibration: CalibrationSet,
    importance_cases: CalibrationSet | None = None,
) -> Variant:
    """Run live and merged model on the calibration cases; one is in memory at a time.

    The merged model is also run on ``importance_cases``, for the importance of its channels.
    """
    with torch.random.fork_rng():  # building the adapter draws from the global generator
        live = load_run(run.directory, merge_base=merge_base, device_map="cpu").model
    use_training_kernels(live)
    layer_outputs = output_residuals(live, weights)
    said_live = live_outputs(live, calibration.prompts)
    plain = merged_model(live.base, dict(weights))
    del live
    gc.collect()  # PEFT's modules refer to one another
    said_merged = merged_outputs(plain, calibration.prompts, run.base.vocab_size)
    importance = None
    if importance_cases is not None:
        prompts = importance_cases.whole_prompts
        importance = collect_importance(plain, prompts, run.base.architecture)
    return Variant(
        said_live,
        said_merged,
        difference(said_live, said_merged, _ids(calibration)),
        relative_logit_difference(said_live, said_merged),
        layer_outputs,
        weight_distances(run, merge_base),
        importance,
    )


def output_residuals(model: SafetyModel, weights: Mapping[str, Tensor]) -> dict[str, float]:
    """Relative difference of each live attention projection from its merged one, by module name.

    The live projection runs its base kernel, LoRA and rotation gate on a random input.
    """
    rng = torch.Generator().manual_seed(0)
    residuals: dict[str, float] = {}
    for output in attention_outputs(model.causal_lm):
        weight = weights[f"{output.name}.weight"]
        probe = torch.randn(_PROBE_ROWS, weight.shape[1], generator=rng)
        with torch.no_grad():
            live = output.projection(probe)
        merged = F.linear(probe, weight, weights.get(f"{output.name}.bias"))
        residuals[output.name] = float((live - merged).norm() / merged.norm())
    return residuals


def weight_distances(run: OpenRun, merge_base: MergeBase) -> dict[str, float]:
    """‖W − W_original‖ / ‖W_original‖ of every linear layer, by module name."""
    chosen = base_weights(run, merge_base)
    distances: dict[str, float] = {}
    for module in linear_names(run.base):
        original = run.base.weights[f"{module}.weight"]
        distances[module] = float((chosen[f"{module}.weight"] - original).norm() / original.norm())
    return distances


def variants_to_measure(run: OpenRun, merge_base: MergeBase) -> list[MergeBase]:
    """The original base, the one that was trained on, and the chosen one."""
    kinds: list[MergeBase] = ["original", run.manifest.config.trained_base, merge_base]
    return list(dict.fromkeys(kinds))


def measure_variants(
    run: OpenRun,
    merged: LazyWeights,
    merge_base: MergeBase,
    calibration: CalibrationSet,
    report: Callable[[str], None],
    *,
    importance_cases: CalibrationSet | None = None,
) -> dict[MergeBase, Variant]:
    """Every variant that the certificate compares; ``merged`` are the chosen one's weights."""
    variants: dict[MergeBase, Variant] = {}
    for kind in variants_to_measure(run, merge_base):
        weights = merged if kind == merge_base else merged_weights(run, kind)
        cases = importance_cases if kind == merge_base else None
        too = f", importance matrix from {len(cases.cases)} cases" if cases is not None else ""
        report(f"comparing the live model with the merged one ({kind} base){too}")
        variants[kind] = measure_variant(run, weights, kind, calibration, cases)
    return variants


def certify(
    run: OpenRun,
    *,
    level: CertificateLevel,
    merge_base: MergeBase,
    weights: WeightEvidence,
    variants: Mapping[MergeBase, Variant],
    files: list[ExportedFile],
    calibration: CalibrationSet | None,
    tolerances: Tolerances,
    importance_cases: CalibrationSet | None = None,
) -> Certificate:
    """Put the evidence gathered so far together and judge it; ``calibration`` is for ``full``."""
    ids = _ids(calibration) if calibration else []
    as_trained = run.manifest.config.trained_base
    checks = list(weights.checks)
    for kind, variant in variants.items():
        checks += _variant_checks(kind, variant, tolerances)
    entries: list[FileEntry] = []
    for file in files:
        found = None
        if file.outputs is not None:
            found = difference(variants[merge_base].merged, file.outputs, ids)
            checks += file_checks(file.parts[0].name, file.label, found, len(ids), tolerances)
        entries.append(_file_entry(file, found))
    return Certificate(
        level=level,
        passed=None if level == "none" else not failures(checks),
        run=_run_entry(run),
        merge_base=merge_base,
        runtime=f"{runtime_version()}; {RUNTIME_MODE}",
        calibration=_calibration_entry(calibration) if calibration else None,
        importance=_importance_entry(importance_cases, variants.get(merge_base)),
        layers=[
            layer.model_copy(
                update={
                    "output_residual": {
                        str(kind): variant.layer_outputs[layer.module]
                        for kind, variant in variants.items()
                    }
                }
            )
            for layer in weights.layers
        ],
        merge_bases={
            kind: _merge_base_entry(
                variant, difference(variants[as_trained].live, variant.merged, ids)
            )
            for kind, variant in variants.items()
        },
        files=entries,
        tolerances=tolerances,
        checks=checks,
        versions=package_versions(),
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
    )


def _variant_checks(kind: str, variant: Variant, tolerances: Tolerances) -> list[Check]:
    model = f"merged model ({kind} base)"
    return [
        check(f"live layer output ({kind} base)", variant.layer_outputs, tolerances.layer_output),
        check("fold logit difference", {model: variant.fold_logits}, tolerances.fold_logits),
        check(
            "fold probability difference",
            {model: variant.fold.max_probability},
            tolerances.fold_probability,
        ),
    ]


def _merge_base_entry(variant: Variant, from_trained: Difference) -> MergeBaseEntry:
    distances = variant.weight_distances.values()
    return MergeBaseEntry(
        weight_distance_mean=sum(distances) / len(distances),
        weight_distance_max=max(distances),
        fold_logit_difference=variant.fold_logits,
        fold=difference_entry(variant.fold),
        from_trained=difference_entry(from_trained),
    )


def _calibration_entry(calibration: CalibrationSet) -> CalibrationEntry:
    return CalibrationEntry(
        file=calibration.file.name,
        sha256=calibration.sha256,
        n=len(calibration.cases),
        left_out=calibration.left_out,
    )


def _importance_entry(
    cases: CalibrationSet | None, variant: Variant | None
) -> ImportanceEntry | None:
    if cases is None or variant is None or variant.importance is None:
        return None
    return ImportanceEntry(
        file=cases.file.name,
        sha256=cases.sha256,
        n=len(cases.cases),
        left_out=cases.left_out,
        tokens=variant.importance.tokens,
        verdict_share=VERDICT_SHARE,
    )


def _file_entry(file: ExportedFile, found: Difference | None) -> FileEntry:
    first, *further = file.parts
    return FileEntry(
        file=first.name,
        format=file.label,
        bytes=sum(part.stat().st_size for part in file.parts),
        sha256=file.sha256 or file_sha256(first),
        further_parts={part.name: file_sha256(part) for part in further},
        kept=file.kept,
        importance_matrix=file.importance,
        difference=difference_entry(found) if found else None,
    )


def _run_entry(run: OpenRun) -> RunEntry:
    manifest = run.manifest
    own = file_sha256(run.directory / MANIFEST)
    return RunEntry(
        directory=run.directory.resolve().name,
        parts={MANIFEST: own, **manifest.sha256},
        base_model=manifest.base_model,
        base_sha256=manifest.base_sha256,
        protocol_hash=manifest.protocol_hash,
        temperature=manifest.temperature,
    )


def _ids(calibration: CalibrationSet) -> list[str]:
    return [case.id for case in calibration.cases]

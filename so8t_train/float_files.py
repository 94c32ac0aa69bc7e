"""A run's merged weights, checked, as float files: what ships, and what llama.cpp quantizes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from so8t_eval.errors import ExportError
from so8t_train.base_model import load_base_config
from so8t_train.calibration import merged_config
from so8t_train.certificate import Tolerances, failures
from so8t_train.certification import weight_evidence
from so8t_train.gguf_export import Float16RangeError, FloatKind, Progress, write_gguf
from so8t_train.gguf_metadata import So8tMetadata
from so8t_train.lazy_weights import LazyWeights
from so8t_train.merged_model import OpenRun, merged_weights
from so8t_train.quantization import FORMATS, QuantFormat

FLOAT_KINDS: Final[dict[str, FloatKind]] = {"f32": "f32", "f16": "f16", "bf16": "bf16"}


def checked_weights(run: OpenRun) -> LazyWeights:
    """The merged weights of a run, each recomputed independently; no model is run.

    Raises:
        ExportError: a rotation or a tensor fails its check.
    """
    merge_base = run.manifest.config.merge_base
    merged = merged_weights(run, merge_base)
    evidence = weight_evidence(run, merged, merge_base, Tolerances())
    raise_failed(failures(evidence.checks), None)
    return merged


def write_float_gguf(
    path: Path,
    run: OpenRun,
    merged: Mapping[str, Tensor],
    quant: QuantFormat,
    progress: Progress = lambda _share: None,
    *,
    synced: bool = True,
) -> None:
    """Write a run's merged weights in a float format. Waits and raises as ``write_gguf``."""
    kind = FLOAT_KINDS[quant.name]
    write_gguf(path, run, merged, kind, facts_of(run), progress=progress, synced=synced)


def write_quantizer_source(
    directory: Path,
    run: OpenRun,
    merged: Mapping[str, Tensor],
    progress: Progress = lambda _share: None,
) -> tuple[Path, QuantFormat]:
    """Write the float file to quantize from: F16, or F32 where a weight is beyond F16's range.

    Nobody waits for it to reach the disk, as it seldom stays; ``sync_file`` it if it does.

    Returns:
        The file ``model-LABEL.gguf`` and its format.
    """
    for quant in (FORMATS["f16"], FORMATS["f32"]):
        path = directory / f"model-{quant.label}.gguf"
        try:
            write_float_gguf(path, run, merged, quant, progress, synced=False)
        except Float16RangeError:
            continue
        break
    return path, quant


def facts_of(run: OpenRun) -> So8tMetadata:
    """What an exported file says about its making."""
    return So8tMetadata(
        run.manifest.protocol_hash,
        run.verdict_ids,
        run.manifest.base_model,
        run.adapter_sha256,
        run.manifest.temperature,
        {name: point.allow_bias for name, point in run.manifest.operating_points.items()},
    )


def run_config(run: OpenRun, merged: Mapping[str, Tensor]) -> Any:
    """The transformers configuration of a run's merged model."""
    base = load_base_config(run.base.source, run.manifest.config.trust_remote_code)
    return merged_config(base, merged)


def raise_failed(failed: list[str], report: Path | None) -> None:
    """Raise the error of a certificate whose checks failed.

    Raises:
        ExportError: ``failed`` is not empty.
    """
    if failed:
        where = f"\nall measurements: {report}" if report else ""
        raise ExportError("the export failed its certificate:\n  " + "\n  ".join(failed) + where)

"""The model files of an export: written, run on the calibration cases, split."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

from so8t_eval import __version__
from so8t_eval.backends.base import Backend
from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.backends.llamacpp_context import runtime_version
from so8t_eval.backends.torch_hf import open_hf_dir
from so8t_train.calibration import CalibrationSet, Outputs, backend_outputs
from so8t_train.certificate import CertificateLevel, Tolerances
from so8t_train.certification import ExportedFile, WeightEvidence
from so8t_train.config import MergeBase
from so8t_train.float_files import (
    FLOAT_KINDS,
    facts_of,
    run_config,
    write_float_gguf,
    write_quantizer_source,
)
from so8t_train.gguf_export import Progress, sync_file
from so8t_train.gguf_split import split_gguf
from so8t_train.hf_export import WEIGHTS, write_hf_directory
from so8t_train.importance import ImportanceMatrix
from so8t_train.lazy_weights import LazyWeights
from so8t_train.merged_model import OpenRun
from so8t_train.quantization import FLOAT_FORMATS, FORMATS, QuantFormat, quantize_gguf
from so8t_train.unfinished_export import UnfinishedExport


class ExportJob(NamedTuple):
    """One export in progress: what `export` was asked for, opened and checked."""

    run: OpenRun
    merge_base: MergeBase
    merged: LazyWeights
    quants: list[QuantFormat]
    level: CertificateLevel
    calibration: CalibrationSet | None
    importance_cases: CalibrationSet | None
    weights: WeightEvidence
    tolerances: Tolerances
    threads: int
    split_bytes: int | None
    report: Callable[[str], None]
    progress: Progress

    @property
    def making(self) -> dict[str, str]:
        """What shapes the files and what is measured on them, by name."""
        sets = {"--calibration": self.calibration, "--imatrix": self.importance_cases}
        return {
            "run": self.run.adapter_sha256,
            "base model": self.run.base.source.sha256,
            "--merge-base": self.merge_base,
            "--quant": ",".join(quant.name for quant in self.quants),
            "--certificate": self.level,
            "--split-max-size": str(self.split_bytes),
            **{name: f"{found.sha256} {len(found.cases)}" for name, found in sets.items() if found},
            "SO8T version": __version__,
            "llama.cpp": runtime_version(),
        }


def write_ggufs(
    job: ExportJob, unfinished: UnfinishedExport, importance: ImportanceMatrix | None
) -> list[ExportedFile]:
    """Write, run and split every format; what only served others is deleted at the end."""
    files: list[ExportedFile] = []
    whole: list[Path] = []
    source: Path | None = None
    quants = job.quants
    if any(quant.name not in FLOAT_FORMATS for quant in quants):
        source, wide = _quantizer_source(job, unfinished)
        quants = [wide, *(quant for quant in quants if quant != wide)]
    for quant in quants:
        path = unfinished.directory / f"model-{quant.label}.gguf"
        matrix = importance if quant.uses_importance else None
        if not unfinished.has(path):
            job.report(f"writing {path.name}")
            if quant.name in FLOAT_FORMATS:
                write_float_gguf(path, job.run, job.merged, quant, job.progress)
            elif source is not None:
                quantize_gguf(source, path, quant, job.threads, job.progress, importance=matrix)
            unfinished.add(path)
        kept = quant in job.quants
        outputs = unfinished.outputs(path)
        if outputs is None:
            outputs = _outputs(job, path.name, partial(_llama, job, path))
            if outputs is not None:
                unfinished.add_outputs(path, outputs)
        parts = split_gguf(path, job.split_bytes) if kept and job.split_bytes else [path]
        if kept or outputs is not None:
            sha256 = unfinished.sha256(path) if parts == [path] else None
            files.append(
                ExportedFile(parts, quant.label, kept, outputs, matrix is not None, sha256)
            )
        if path not in parts or not (kept or outputs is not None):
            whole.append(path)
    for path in whole:
        path.unlink()
    return files


def _quantizer_source(job: ExportJob, unfinished: UnfinishedExport) -> tuple[Path, QuantFormat]:
    """The float file to quantize from, and its format; on the disk if it stays."""
    known = unfinished.source
    if known is not None:
        return known, next(q for q in FORMATS.values() if known.name == f"model-{q.label}.gguf")
    job.report("writing the float file to quantize from")
    source, wide = write_quantizer_source(unfinished.directory, job.run, job.merged, job.progress)
    if wide in job.quants:
        sync_file(source)
    unfinished.add(source, is_source=True)
    return source, wide


def _llama(job: ExportJob, path: Path) -> Backend:
    return LlamaCppBackend(path, threads=job.threads, exact=True)


def write_hf(job: ExportJob, stage: Path) -> list[ExportedFile]:
    """Write a Hugging Face directory into ``stage`` and run it."""
    quant = job.quants[0]
    job.report(f"writing a Hugging Face model ({quant.label})")
    write_hf_directory(
        stage,
        job.run,
        job.merged,
        config=run_config(job.run, job.merged),
        kind=FLOAT_KINDS[quant.name],
        facts=facts_of(job.run),
    )
    outputs = _outputs(job, WEIGHTS, lambda: open_hf_dir(stage, threads=job.threads))
    return [ExportedFile([stage / WEIGHTS], quant.label, True, outputs)]


def _outputs(job: ExportJob, name: str, opened: Callable[[], Backend]) -> Outputs | None:
    """What a file says on the calibration cases; None where there are none."""
    if job.calibration is None:
        return None
    job.report(f"running {len(job.calibration.cases)} cases on {name}")
    return backend_outputs(opened(), name, job.calibration, job.run.tokenizer)

"""From a run directory to files that ship: merge, fold, write, quantize, and certify all of it."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final, Literal, NamedTuple

import torch

from so8t_eval.backends.cpu_threads import default_threads
from so8t_eval.errors import UsageError
from so8t_train.calibration import (
    DEFAULT_CASES,
    DEFAULT_FILE,
    DEFAULT_IMPORTANCE_CASES,
    DEFAULT_IMPORTANCE_FILE,
    load_calibration,
)
from so8t_train.certificate import (
    CERTIFICATE,
    FAILED_CERTIFICATE,
    Certificate,
    CertificateLevel,
    Tolerances,
    failures,
    write_certificate,
)
from so8t_train.certification import (
    ExportedFile,
    Variant,
    WeightEvidence,
    certify,
    measure_variants,
    weight_evidence,
)
from so8t_train.config import MergeBase, merge_base_problem
from so8t_train.export_files import ExportJob, write_ggufs, write_hf
from so8t_train.export_staging import check_target, staged, temporary_sibling
from so8t_train.float_files import (
    FLOAT_KINDS,
    checked_weights,
    raise_failed,
    write_float_gguf,
    write_quantizer_source,
)
from so8t_train.gguf_export import (
    Progress,
    check_gguf_base,
    disk_error,
)
from so8t_train.gguf_split import parse_size
from so8t_train.merged_model import merged_weights, open_run
from so8t_train.quantization import (
    FLOAT_FORMATS,
    FORMATS,
    QuantFormat,
    check_takes_importance,
    parse_quants,
    quantize_gguf,
)
from so8t_train.unfinished_export import check_unfinished, unfinished_export

DEFAULT_QUANTS: Final = {"gguf": "f16,q8_0", "hf": "f32"}


class ExportOptions(NamedTuple):
    """What to write. None: the default of the format, the run, or this machine."""

    format: Literal["gguf", "hf"] = "gguf"
    quants: str | None = None
    """Comma-separated formats; for ``hf`` one float format."""
    merge_base: MergeBase | None = None
    calibration: Path | None = None
    calibration_cases: int = DEFAULT_CASES
    threads: int | None = None
    certificate: CertificateLevel = "full"
    """``full`` holds the live model in memory, the others one block of rows at a time."""
    split_max_size: str | None = None
    """Such as ``2G``: larger GGUF files are split into parts."""
    imatrix: bool = False
    """Quantize below Q8_0 with an importance matrix."""
    imatrix_file: Path | None = None
    """Cases to collect it on. None: the shipped training cases."""
    imatrix_cases: int = DEFAULT_IMPORTANCE_CASES
    resume: bool = False
    """Go on with an unfinished export."""


_DEFAULTS: Final = ExportOptions()


class ExportResult(NamedTuple):
    """A passed export: its directory and certificate, and how long it took."""

    directory: Path
    certificate: Certificate
    seconds: float


def export(
    run_directory: Path,
    directory: Path,
    options: ExportOptions = _DEFAULTS,
    report: Callable[[str], None] = lambda _line: None,
    progress: Progress = lambda _share: None,
) -> ExportResult:
    """Write a certified export of a run to ``directory``, whole or not at all.

    A failed certificate is left there as ``certificate.failed.json``, and nothing else. Any other
    failure, or an interrupt, keeps GGUF files that are whole in ``unfinished_directory``, for
    ``resume``. ``report`` is told what is being done, line by line, and ``progress`` the share of a
    file that is written.

    Raises:
        UsageError: wrong options, or ``directory`` holds something else, or there is an unfinished
            export that is not to be resumed or is another one.
        ModelFileError: a part of the run or its base is missing or altered.
        ExportError: the certificate failed, naming layer or file; or the base is not supported.
        DiskError: a file could not be written.
    """
    started = time.monotonic()
    quants = _quants(options)
    split_bytes = _split_bytes(options)
    check_target(directory)
    if options.format == "gguf":
        check_unfinished(directory, resume=options.resume)
    job = _prepare(
        run_directory, quants, options, split_bytes=split_bytes, report=report, progress=progress
    )
    _require(job, {}, [], directory)  # a fault in the weights needs no forward pass to show
    variants: dict[MergeBase, Variant] = {}
    if job.calibration is not None:
        variants = measure_variants(
            job.run,
            job.merged,
            job.merge_base,
            job.calibration,
            report,
            importance_cases=job.importance_cases,
        )
        _require(job, variants, [], directory)
    if options.format == "hf":
        with staged(directory) as stage:
            certificate = _finish(job, variants, write_hf(job, stage), directory, stage)
    else:
        with unfinished_export(
            directory, job.making, resume=options.resume, report=report
        ) as unfinished:
            importance = variants[job.merge_base].importance if variants else None
            files = write_ggufs(job, unfinished, importance)
            certificate = _finish(job, variants, files, directory, unfinished.directory)
    return ExportResult(directory, certificate, time.monotonic() - started)


def _finish(
    job: ExportJob,
    variants: dict[MergeBase, Variant],
    files: list[ExportedFile],
    directory: Path,
    stage: Path,
) -> Certificate:
    """Judge what was written, drop what does not stay, and leave the certificate."""
    certificate = _require(job, variants, files, directory)
    for file in files:
        if not file.kept:
            file.parts[0].unlink()
    write_certificate(stage / CERTIFICATE, certificate)
    return certificate


def export_reference_gguf(run_directory: Path, out_path: Path, quant: str = "q8_0") -> Path:
    """Write one GGUF of a run whose certificate is known, checking weights but running no model.

    Every merged tensor is recomputed independently; the calibration cases are not run.

    Raises:
        ModelFileError, ExportError, DiskError: as ``export``; ``out_path`` is then not written.
    """
    run = open_run(run_directory)
    merged = checked_weights(run)
    chosen = parse_quants(quant)[0]
    with temporary_sibling(out_path) as stage:
        written = stage / out_path.name
        if chosen.name in FLOAT_FORMATS:
            write_float_gguf(written, run, merged, chosen)
        else:
            wide, _ = write_quantizer_source(stage, run, merged)
            quantize_gguf(wide, written, chosen, default_threads())
        try:
            written.replace(out_path)
        except OSError as error:
            raise disk_error(out_path, error) from error
    return out_path


def _quants(options: ExportOptions) -> list[QuantFormat]:
    asked = DEFAULT_QUANTS[options.format] if options.quants is None else options.quants
    quants = parse_quants(asked)
    if options.format == "hf" and (len(quants) > 1 or quants[0].name not in FLOAT_KINDS):
        raise UsageError(
            f"--quant: expected one of {', '.join(FLOAT_KINDS)} with --format hf, found "
            f"{options.quants!r}"
        )
    return quants


def _split_bytes(options: ExportOptions) -> int | None:
    if options.split_max_size is None:
        return None
    if options.format == "hf":
        raise UsageError("--split-max-size: expected with --format gguf only; leave it out")
    return parse_size(options.split_max_size)


def _prepare(
    run_directory: Path,
    quants: list[QuantFormat],
    options: ExportOptions,
    *,
    split_bytes: int | None,
    report: Callable[[str], None],
    progress: Progress,
) -> ExportJob:
    with_importance = _wants_importance(options, quants)
    threads = options.threads or default_threads()
    if options.threads is not None:
        torch.set_num_threads(threads)
    report(f"verifying {run_directory} and reading its base model")
    run = open_run(run_directory)
    merge_base = options.merge_base or run.manifest.config.merge_base
    if problem := merge_base_problem(run.manifest.config, merge_base):
        raise UsageError(f"--merge-base: {problem}")
    if options.format == "gguf":
        check_gguf_base(run.base, run.tokenizer)
    calibration = None
    if options.certificate == "full":
        calibration = load_calibration(
            options.calibration or DEFAULT_FILE, options.calibration_cases, run.tokenizer
        )
    importance_cases = None
    if calibration is not None and with_importance:
        importance_cases = load_calibration(
            options.imatrix_file or DEFAULT_IMPORTANCE_FILE,
            options.imatrix_cases,
            run.tokenizer,
            option="--imatrix-file",
            without={case.content_hash for case in calibration.cases},
        )
    tolerances = Tolerances()
    merged = merged_weights(run, merge_base)
    evidence = WeightEvidence([], [])
    if options.certificate != "none":
        report(f"merging LoRA and folding rotation gates into the {merge_base} base, and checking")
        evidence = weight_evidence(run, merged, merge_base, tolerances)
    return ExportJob(
        run=run,
        merge_base=merge_base,
        merged=merged,
        quants=quants,
        level=options.certificate,
        calibration=calibration,
        importance_cases=importance_cases,
        weights=evidence,
        tolerances=tolerances,
        threads=threads,
        split_bytes=split_bytes,
        report=report,
        progress=progress,
    )


def _wants_importance(options: ExportOptions, quants: list[QuantFormat]) -> bool:
    """Whether to collect an importance matrix.

    Raises:
        UsageError: one is asked for that cannot be collected, or that no format uses.
        ExportError: the installed llama-cpp-python takes none.
    """
    used = [quant.name for quant in quants if quant.uses_importance]
    if not options.imatrix:
        if options.imatrix_file is not None:
            raise UsageError("--imatrix-file: expected with --imatrix only; add it")
        return False
    if options.certificate != "full":
        raise UsageError(
            f"--imatrix: expected with --certificate full, which runs the merged model, found "
            f"{options.certificate}; leave one of them out"
        )
    if not used:
        takers = ", ".join(quant.name for quant in FORMATS.values() if quant.uses_importance)
        raise UsageError(
            f"--imatrix: expected a format that uses one ({takers}), found "
            f"{', '.join(quant.name for quant in quants)}; change --quant, or leave it out"
        )
    check_takes_importance()
    return True


def _require(
    job: ExportJob,
    variants: dict[MergeBase, Variant],
    files: list[ExportedFile],
    directory: Path,
) -> Certificate:
    """The certificate of what was measured so far, if it passes."""
    certificate = certify(
        job.run,
        level=job.level,
        merge_base=job.merge_base,
        weights=job.weights,
        variants=variants,
        files=files,
        calibration=job.calibration,
        tolerances=job.tolerances,
        importance_cases=job.importance_cases,
    )
    if certificate.passed is False:
        report = directory / FAILED_CERTIFICATE
        write_certificate(report, certificate)
        raise_failed(failures(certificate.checks), report)
    return certificate

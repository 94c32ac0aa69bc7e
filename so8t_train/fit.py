"""From a configuration to a run directory: load, train or resume, calibrate, save."""

import secrets
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.errors import ConfigError, DiskError
from so8t_train.base_model import BaseModelSource, resolve_base
from so8t_train.compute_dtype import EMULATED, compute_dtype, is_emulated
from so8t_train.config import FitConfig
from so8t_train.continuation import (
    Movement,
    Origin,
    check_origin,
    movement,
    origin_directory,
    start_from,
)
from so8t_train.data_parallel import DataParallel, join_processes
from so8t_train.dev_evaluation import (
    DevResult,
    at_bound,
    dev_logits,
    fitted_temperature,
    labels_of,
    summarize,
)
from so8t_train.emergency import saved_on_failure
from so8t_train.heap import freed_blocks_returned
from so8t_train.model_shape import read_shape
from so8t_train.operating_points import OperatingPoint, operating_points
from so8t_train.phase_recorder import PhaseRecorder
from so8t_train.quantized_layers import use_training_kernels
from so8t_train.replay import REPLAYED, load_fit_cases
from so8t_train.run_dir import MANIFEST, read_manifest, save_run
from so8t_train.safety_model import SafetyModel, build_safety_model
from so8t_train.start_checks import check_device, check_shape, sole_fit
from so8t_train.step_report import StepReport, TrainingHooks
from so8t_train.stop_signals import stop_signals
from so8t_train.trainer import CHECKPOINTS, Trainer
from so8t_train.training_data import (
    TrainingExample,
    TrainingSet,
    check_verdicts,
    load_training_cases,
    tokenize_cases,
    weighted,
)
from so8t_train.training_log import MEMORY_LOG, TRAIN_LOG, TrainingLog
from so8t_train.training_plan import shaping_settings

__all__ = ["MEMORY_LOG", "TRAIN_LOG", "FitReporter", "FitResult", "Resume", "fit"]

Resume = bool | Literal["auto"]
"""False: start. True: continue an interrupted fit. auto: whichever of the two there is to do; a
finished fit is done."""
_ECHO_S: Final = 5.0
"""Seconds in which a launcher's copy of a stop signal arrives."""


class FitResult(NamedTuple):
    """What a finished fit reports: where it is and how it does on dev."""

    directory: Path
    steps: int
    seconds: float
    dev: DevResult | None
    temperature: float
    moved: Movement | None
    """What a fit that started from a run has changed."""


class FitReporter(NamedTuple):
    """How ``fit`` talks to its caller: one line of news, and every step."""

    news: Callable[[str], None]
    on_step: Callable[[StepReport, float], None]


def fit(config: FitConfig, *, resume: Resume, reporter: FitReporter) -> FitResult:
    """Train ``config`` into its output directory, or continue an interrupted fit there.

    Raises:
        ConfigError: the directory holds another or a finished run, or the data do not serve.
        Interrupted: SIGINT or SIGTERM; a resumable checkpoint was saved.
        BackendError, DiskError: training or saving failed; an emergency checkpoint was saved if
            there was a whole step to save.
    """
    parallel = join_processes(config)
    check_device(config)
    with parallel.held_by_main(partial(sole_fit, config.output_dir)):
        return _fit(config, resume=resume, reporter=reporter, parallel=parallel)


def _fit(
    config: FitConfig, *, resume: Resume, reporter: FitReporter, parallel: DataParallel
) -> FitResult:
    started = time.monotonic()
    config = parallel.whole_step(config)
    if not parallel.is_main:
        reporter = FitReporter(lambda _news: None, lambda _report, _memory: None)
    session = parallel.from_main(lambda: secrets.token_hex(4))
    directory = config.output_dir
    if resume == "auto" and parallel.from_main((directory / MANIFEST).is_file):
        return parallel.from_main(lambda: _finished(config, reporter))
    _check_directory(directory, resume)
    parallel.from_main(lambda: _clear_leftovers(directory))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    phases = PhaseRecorder(config, reporter.news, active=parallel.is_main)
    with freed_blocks_returned():
        start = _load(config, reporter, parallel, phases)
        trainer = _trainer(config, start, session, parallel)
    model, dev = start.model, start.dev.examples
    phases.ends("hold")
    phases.predict(model, start.source, start.data.examples)
    before = _dev_logits(model, dev) if start.origin and parallel.is_main else None
    resumed = bool(resume) and trainer.resume(reporter.news, start_over=resume == "auto")
    parallel.require_same(
        lambda: (trainer.config_hash, trainer.step),
        "training and step",
        "every process needs the same files and sees the same output_dir",
    )
    logs = parallel.on_main(lambda: _open_logs(trainer))
    phases.begin(directory, resumed=resumed)
    if resume is True and not resumed:
        reporter.news(f"no checkpoint in {directory}: starting at step 1")
    if resumed:
        reporter.news(
            f"resumed after step {trainer.step} of {trainer.total_steps} (session {session})"
        )

    def on_step(report: StepReport) -> None:
        if logs is not None:  # this is the main process
            reporter.on_step(report, logs.write(report))
            if report.step % config.save_every_steps == 0:
                phases.ends("train")

    echo_s = _ECHO_S if parallel.processes > 1 else 0.0
    with (
        phases.during("train"),
        stop_signals(echo_s) as stop,
        saved_on_failure(trainer, reporter.news),
    ):
        trainer.run(TrainingHooks(on_step, stop))
    reporter.news("calibrating on the dev split and saving")

    def finish() -> FitResult:
        after = _dev_logits(model, dev)
        # A temperature fitted to capped logits cannot be folded into rows capped afterwards.
        hold = config.freeze == "safe" or model.softcap is not None
        result = _calibrate(model, after, dev, hold=hold, news=reporter.news)
        seconds = time.monotonic() - started
        training = _training_summary(config, trainer, logs, dev=result, resumed=resumed)
        moved = None
        if start.origin is not None:
            moved = movement(start.origin, model.gate_tensors(), dev, before, after)
            training |= {"started_from": start.origin.sha256, "moved": moved._asdict()}
        save_run(
            *(directory, model, start.tokenizer, start.source, config, training),
            _points(model, after, dev),
        )
        phases.ends("save")
        from so8t_train.model_card import write_model_card

        write_model_card(directory, config.train_file, config.dev_file)
        return FitResult(directory, trainer.step, seconds, result, model.temperature, moved)

    return parallel.from_main(finish)


def _trainer(config: FitConfig, start: "_Start", session: str, parallel: DataParallel) -> Trainer:
    return Trainer(
        start.model,
        config,
        examples=start.data.examples,
        dev=start.dev.examples,
        run_directory=config.output_dir,
        start_sha256=start.origin.sha256 if start.origin else start.source.sha256,
        session=session,
        parallel=parallel,
    )


def _open_logs(trainer: Trainer) -> TrainingLog:
    _make_directory(trainer.run_directory)
    return TrainingLog(
        trainer.run_directory,
        step=trainer.step,
        session=trainer.session,
        memory=trainer.memory,
        cases=trainer.config.cases_per_step,
    )


def _finished(config: FitConfig, reporter: FitReporter) -> FitResult:
    """What ``fit`` returned when it finished; writes the model card if it was killed before that."""
    directory = config.output_dir
    manifest = read_manifest(directory)
    theirs, ours = shaping_settings(manifest.config), shaping_settings(config)
    if different := sorted(key for key in ours if theirs.get(key) != ours[key]):
        raise ConfigError(
            f"output_dir: {directory} holds a finished run with another configuration "
            f"({', '.join(different)}); choose another output_dir, or move it away"
        )
    reporter.news(f"{directory} is finished; nothing to do")
    _clear_leftovers(directory)
    if not (directory / "README.md").is_file():
        from so8t_train.model_card import write_model_card

        write_model_card(directory, config.train_file, config.dev_file)
    training = manifest.training
    dev, moved = training.get("dev"), training.get("moved")
    return FitResult(
        directory,
        training["steps"],
        training["seconds"],
        DevResult(**dev) if dev else None,
        manifest.temperature,
        Movement(**moved) if moved else None,
    )


class _Start(NamedTuple):
    """What training begins with."""

    source: BaseModelSource
    model: SafetyModel
    tokenizer: HfTokenizer
    data: TrainingSet
    dev: TrainingSet
    origin: Origin | None
    """The run that is continued, if one is."""


def _load(
    config: FitConfig, reporter: FitReporter, parallel: DataParallel, phases: PhaseRecorder
) -> _Start:
    source = resolve_base(config.base_model)
    check_shape(config, read_shape(source, config.trust_remote_code))
    directory = origin_directory(config)
    if config.freeze == "safe" and directory is None:
        raise ConfigError(
            "freeze: safe without init_from would freeze an untrained safety part; name the run to "
            "continue with init_from: DIR, or init_from: reference"
        )
    manifest = check_origin(directory, source, config) if directory else None
    cases, n_replayed = load_fit_cases(config)
    check_verdicts(cases, config)
    if n_replayed:
        reporter.news(
            f"replaying {n_replayed} cases beside {len(cases) - n_replayed} of train_file"
        )
    dev_cases = load_training_cases(config.dev_file) if config.dev_file else []
    dtype = compute_dtype(config)
    reporter.news(
        f"loading {source.name} ({config.precision} base, {str(dtype).removeprefix('torch.')})"
    )
    model, tokenizer = build_safety_model(source, parallel.placed(config), dtype)
    phases.ends("load")
    if is_emulated(dtype, model.device):
        reporter.news(f"warning: {EMULATED}")
    origin = None
    if directory is not None and manifest is not None:
        origin = start_from(directory, manifest, model)
        held = "held" if config.freeze == "safe" else "learning"
        reporter.news(f"continuing {directory.name}, R_safe and verdict rows {held}")
    data, dev_data = (
        tokenize_cases(split, tokenizer, model.verdict_ids, None, config.max_length)
        for split in (cases, dev_cases)
    )
    _report_left_out("train_file", data, config.max_length, reporter)
    if dev_cases:
        _report_left_out("dev_file", dev_data, config.max_length, reporter)
    return _Start(source, model, tokenizer, weighted(data, config), dev_data, origin)


def _report_left_out(key: str, data: TrainingSet, max_length: int, reporter: FitReporter) -> None:
    n_left_out = len(data.too_long)
    if not data.examples:
        raise ConfigError(
            f"{key}: every case is longer than max_length={max_length} tokens; raise it"
        )
    if n_left_out:
        reporter.news(
            f"{key}: left out {n_left_out} of {n_left_out + len(data.examples)} cases longer than "
            f"max_length={max_length} tokens: {', '.join(data.too_long[:5])}"
        )
    if data.long_replies:
        reporter.news(
            f"{key}: {len(data.long_replies)} replies do not fit max_length={max_length} tokens and "
            f"are not learned, their verdicts are: {', '.join(data.long_replies[:5])}"
        )


def _dev_logits(
    model: SafetyModel, dev: Sequence[TrainingExample]
) -> npt.NDArray[np.float64] | None:
    """Verdict logits (n, 3) at temperature 1 on the dev split; None without one."""
    if not dev:
        return None
    use_training_kernels(model.eval())
    held, model.temperature = model.temperature, 1.0
    logits = dev_logits(model, dev)
    model.temperature = held
    return logits


def _calibrate(
    model: SafetyModel,
    logits: npt.NDArray[np.float64] | None,
    dev: Sequence[TrainingExample],
    *,
    hold: bool,
    news: Callable[[str], None],
) -> DevResult | None:
    """Fit the model's temperature on the dev split unless it is to hold; its results there."""
    if logits is None:
        return None
    labels = labels_of(dev)
    if not hold:
        model.temperature = fitted_temperature(logits, labels)
        if at_bound(model.temperature):
            news(
                f"warning: the temperature that calibrates the dev split best is at the end of its "
                f"range ({model.temperature:.3g}), so probabilities are not calibrated: are its "
                "cases few, easy, or also in train_file?"
            )
    return summarize(logits / model.temperature, labels)


def _points(
    model: SafetyModel,
    logits: npt.NDArray[np.float64] | None,
    dev: Sequence[TrainingExample],
) -> dict[str, OperatingPoint]:
    return {} if logits is None else operating_points(logits / model.temperature, labels_of(dev))


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DiskError(f"cannot create {directory}: {error.strerror or error}") from error


def _clear_leftovers(directory: Path) -> None:
    """Remove files that a killed process was writing."""
    for path in directory.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _check_directory(directory: Path, resume: Resume) -> None:
    if (directory / MANIFEST).is_file():
        raise ConfigError(
            f"output_dir: {directory} holds a finished run; choose another output_dir, or move it "
            "away"
        )
    unfinished = (directory / CHECKPOINTS).is_dir() and any((directory / CHECKPOINTS).iterdir())
    if unfinished and not resume:
        raise ConfigError(
            f"output_dir: {directory} holds an interrupted run; add --resume to continue it, or "
            "choose another output_dir"
        )


def _training_summary(
    config: FitConfig,
    trainer: Trainer,
    logs: TrainingLog | None,
    *,
    dev: DevResult | None,
    resumed: bool,
) -> dict[str, Any]:
    return {
        "steps": trainer.step,
        "cases": len(trainer.examples),
        "replayed": sum(example.id.startswith(REPLAYED) for example in trainer.examples),
        "cases_per_step": config.cases_per_step,
        "seconds": 0.0 if logs is None else round(logs.step_seconds, 1),
        "resumed": resumed,
        "session": trainer.session,
        "sessions": [] if logs is None else logs.sessions,
        "processes": trainer.parallel.processes,
        "device": str(trainer.model.device),
        "compute_dtype": str(trainer.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "trainable_parameters": sum(p.numel() for p in trainer.names),
        "dev": dev._asdict() if dev else None,
    }

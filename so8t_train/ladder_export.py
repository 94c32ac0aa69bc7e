"""Export a run step by step for the drift ladder: float weights once, then one file at a time."""

import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch

from so8t_eval.backends.registry import ModelSpec
from so8t_eval.drift_ladder import (
    GGUF_STEPS,
    LIVE,
    MERGED,
    Ladder,
    LadderModel,
    LadderProvider,
)
from so8t_train.calibration import DEFAULT_FILE
from so8t_train.export_staging import check_target, staged
from so8t_train.float_files import (
    checked_weights,
    facts_of,
    run_config,
    write_float_gguf,
    write_quantizer_source,
)
from so8t_train.gguf_export import check_gguf_base, disk_error
from so8t_train.hf_export import write_hf_directory
from so8t_train.lazy_weights import LazyWeights
from so8t_train.merged_model import OpenRun, open_run
from so8t_train.quantization import FORMATS, QuantFormat, quantize_gguf
from so8t_train.reference_model import RUN_DIRECTORY

MERGED_DIRECTORY: Final = "merged"


@contextmanager
def open_ladder(
    run: Path,
    steps: Sequence[str],
    *,
    keep: Path | None,
    threads: int,
    report: Callable[[str], None],
) -> Iterator[Ladder]:
    """Export a run's steps; see ``so8t_eval.drift_ladder.OpenLadder``."""
    torch.set_num_threads(threads)
    if keep is not None:
        check_target(keep, "--keep")
    with _workspace(keep) as directory:
        export = _LadderExport(
            run, steps, directory, keep=keep is not None, threads=threads, report=report
        )
        yield Ladder(directory, export.models())


PROVIDER: Final = LadderProvider(open_ladder, RUN_DIRECTORY, DEFAULT_FILE)
"""Registered as an entry point of so8t_eval."""


@contextmanager
def _workspace(keep: Path | None) -> Iterator[Path]:
    if keep is not None:
        with staged(keep) as directory:
            yield directory
        return
    try:
        temporary = tempfile.TemporaryDirectory(prefix="so8t-drift-", ignore_cleanup_errors=True)
    except OSError as error:
        raise disk_error(Path(tempfile.gettempdir()), error) from error
    with temporary as name:
        yield Path(name)


class _LadderExport:
    """Files of one run in one directory; ``keep`` leaves those of the asked-for steps there."""

    def __init__(
        self,
        run: Path,
        steps: Sequence[str],
        directory: Path,
        *,
        keep: bool,
        threads: int,
        report: Callable[[str], None],
    ) -> None:
        self._run, self._steps, self._directory = run, steps, directory
        self._keep, self._threads, self._report = keep, threads, report

    def models(self) -> Iterator[LadderModel]:
        """Every step's model in order; what is not kept is deleted when it is done with."""
        source = self._write_floats()
        for step in self._steps:
            if step == LIVE:
                yield LadderModel(step, ModelSpec("torch", self._run))
            elif step == MERGED:
                directory = self._directory / MERGED_DIRECTORY
                yield LadderModel(step, ModelSpec("torch", directory))
                if not self._keep:
                    shutil.rmtree(directory, ignore_errors=True)
            else:
                path = self._gguf(FORMATS[step])
                if not path.exists():
                    self._report(f"quantizing {path.name}")
                    quantize_gguf(source, path, FORMATS[step], self._threads)
                yield LadderModel(step, ModelSpec("llamacpp", path))
                if not self._keep and path != source:
                    path.unlink(missing_ok=True)
        if source not in [self._gguf(FORMATS[step]) for step in self._formats()]:
            source.unlink(missing_ok=True)

    def _write_floats(self) -> Path:
        """Merge once, write what the steps need; return the GGUF file to quantize from."""
        self._report(f"verifying {self._run}, merging and folding it into float weights")
        run = open_run(self._run)
        if self._formats():
            check_gguf_base(run.base, run.tokenizer)
        merged = checked_weights(run)
        if MERGED in self._steps:
            self._report("writing the merged model for transformers")
            self._write_merged(run, merged)
        source = self._gguf(FORMATS["f16"])
        if self._formats():
            self._report(f"writing {source.name}")
            source, _ = write_quantizer_source(self._directory, run, merged)
        for step in ("f32", "f16"):
            path = self._gguf(FORMATS[step])
            if step in self._steps and path != source:
                self._report(f"writing {path.name}")
                write_float_gguf(path, run, merged, FORMATS[step])
        return source

    def _write_merged(self, run: OpenRun, merged: LazyWeights) -> None:
        write_hf_directory(
            self._directory / MERGED_DIRECTORY,
            run,
            merged,
            config=run_config(run, merged),
            kind="f32",
            facts=facts_of(run),
        )

    def _formats(self) -> list[str]:
        return [step for step in self._steps if step in GGUF_STEPS]

    def _gguf(self, quant: QuantFormat) -> Path:
        return self._directory / f"model-{quant.label}.gguf"

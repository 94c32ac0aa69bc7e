"""An export that is not finished: its whole files so far stay, so that the same command goes on."""

import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import numpy as np
from pydantic import BaseModel, ValidationError

from so8t_eval.atomic_write import atomic_write_text
from so8t_eval.errors import ExportError, UsageError
from so8t_eval.file_hash import file_sha256
from so8t_train.calibration import Outputs
from so8t_train.export_staging import put_in_place
from so8t_train.file_lock import held_lock
from so8t_train.gguf_export import disk_error

STATE: Final = "unfinished.json"
_LOCK: Final = "export.lock"


class _File(BaseModel):
    """A whole file: its hash, and its verdict probabilities (n, 3) where it has been run."""

    sha256: str
    verdicts: list[list[float]] | None = None


class _State(BaseModel):
    """What is made, and what of it is there."""

    making: dict[str, str]
    source: str | None = None
    """Name of the file that others are quantized from."""
    files: dict[str, _File] = {}


class UnfinishedExport:
    """The directory beside an export's target in which its files are made, and what it holds.

    Every whole file is entered in ``unfinished.json`` with its hash. What is entered is looked at
    again before it is used, so a file that a power failure left damaged is made anew.
    """

    def __init__(self, directory: Path, state: _State, report: Callable[[str], None]) -> None:
        self.directory = directory
        self._state, self._report = state, report
        self._seen: set[str] = set()

    @property
    def names(self) -> list[str]:
        """Whole files, in the order they were made."""
        return list(self._state.files)

    @property
    def source(self) -> Path | None:
        """The file that others are quantized from, if it is whole."""
        name = self._state.source
        return self.directory / name if name and self.has(self.directory / name) else None

    def has(self, path: Path) -> bool:
        """Whether a file is there whole."""
        entry = self._state.files.get(path.name)
        if entry is None or path.name in self._seen:
            return entry is not None
        if not path.is_file() or file_sha256(path) != entry.sha256:
            self._report(f"{path.name} of the unfinished export is damaged; making it again")
            del self._state.files[path.name]
            return False
        self._report(f"{path.name} is there already")
        self._seen.add(path.name)
        return True

    def add(self, path: Path, *, is_source: bool = False) -> None:
        """Enter a file that is whole."""
        files = self._state.files | {path.name: _File(sha256=file_sha256(path))}
        source = path.name if is_source else self._state.source
        self._write(self._state.model_copy(update={"files": files, "source": source}))
        self._seen.add(path.name)

    def sha256(self, path: Path) -> str:
        """Hash (hex) of a whole file."""
        return self._state.files[path.name].sha256

    def outputs(self, path: Path) -> Outputs | None:
        """What a whole file said on the calibration cases, if it was asked."""
        verdicts = self._state.files[path.name].verdicts
        return None if verdicts is None else Outputs(np.array(verdicts, dtype=np.float64), None)

    def add_outputs(self, path: Path, outputs: Outputs) -> None:
        """Enter what a whole file said; numbers that are not finite are not kept."""
        if np.isfinite(outputs.verdicts).all():
            entry = _File(sha256=self.sha256(path), verdicts=outputs.verdicts.tolist())
            files = self._state.files | {path.name: entry}
            self._write(self._state.model_copy(update={"files": files}))

    def _write(self, state: _State) -> None:
        atomic_write_text(self.directory / STATE, state.model_dump_json())
        self._state = state


def unfinished_directory(target: Path) -> Path:
    """Where the files of an export to ``target`` are made."""
    absolute = target.absolute()
    return absolute.with_name(f"{absolute.name}.unfinished")


def check_unfinished(target: Path, *, resume: bool) -> None:
    """Refuse to begin where files of an earlier export are kept, unless it is to go on.

    Raises:
        UsageError: naming the directory.
    """
    directory = unfinished_directory(target)
    if (directory / STATE).is_file() and not resume:
        raise UsageError(
            f"-o {target}: {directory} holds an unfinished export; add --resume to go on with it, or "
            "delete it"
        )


@contextmanager
def unfinished_export(
    target: Path, making: Mapping[str, str], *, resume: bool, report: Callable[[str], None]
) -> Iterator[UnfinishedExport]:
    """Yield the unfinished export to ``target``, which gets its name on success.

    ``making`` says by name what shapes the files; ``resume`` goes on with what is there. On failure
    whole files are kept, and ``report`` is told where, unless the failure is the export's own:
    a failed certificate leaves no model behind.

    Raises:
        UsageError: what is there is another export, or is being written by another process.
        DiskError: the directory cannot be made or put in place.
    """
    check_unfinished(target, resume=resume)
    directory = unfinished_directory(target)
    busy = UsageError(
        f"-o {target}: another process is exporting there ({directory}); wait for it, or choose "
        "another directory"
    )
    try:
        lock = held_lock(directory / _LOCK, busy)
    except OSError as error:
        raise disk_error(target, error) from error
    export: UnfinishedExport | None = None
    kept = True  # what another export has made is not ours to delete
    try:
        export = UnfinishedExport(directory, _state(directory, dict(making)), report)
        kept = False
        yield export
        for name in (STATE, _LOCK):
            if name == _LOCK:
                lock.release()
            (directory / name).unlink(missing_ok=True)
        put_in_place(directory, target)
    except BaseException as error:
        kept = kept or (bool(export and export.names) and not isinstance(error, ExportError))
        if kept and export is not None:
            report(f"kept in {directory}: {', '.join(export.names)}; go on with --resume")
        raise
    finally:
        lock.release()
        if not kept:
            shutil.rmtree(directory, ignore_errors=True)


def _state(directory: Path, making: dict[str, str]) -> _State:
    """What is there, or an empty beginning; leftovers that are not entered are deleted.

    Raises:
        UsageError: what is there is another export.
    """
    path = directory / STATE
    state = _State(making=making)
    if path.is_file():
        try:
            state = _State.model_validate_json(path.read_text(encoding="utf-8"))
        except ValidationError as error:
            raise UsageError(f"{path}: not readable ({error}); delete {directory}") from error
    different = sorted(key for key in making if state.making.get(key) != making[key])
    if different:
        raise UsageError(
            f"{directory} holds an unfinished export that differs in {', '.join(different)}; give "
            "the same run and options, or delete it"
        )
    for leftover in directory.iterdir():
        if leftover.name not in {*state.files, STATE, _LOCK}:
            leftover.unlink()
    return state

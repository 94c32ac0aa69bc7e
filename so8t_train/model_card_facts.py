"""What a model card is made from: a run directory's records, and its case files as they are now."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple

from so8t_eval.cases import Case, load_cases
from so8t_eval.errors import CaseFileError, DiskError, ModelFileError
from so8t_eval.file_hash import file_sha256
from so8t_train.memory_phases import MemoryPhases, read_phases

UNKNOWN: Final = "not recorded"
_MANIFEST, _TRAIN_LOG, MEMORY_LOG = "so8t.json", "train_log.jsonl", "memory.jsonl"


class RunFacts(NamedTuple):
    """A run directory's records; what is absent is an empty mapping or list, or None."""

    manifest: Mapping[str, object]
    config: Mapping[str, object]
    training: Mapping[str, object]
    steps: list[dict[str, object]]
    memory: list[dict[str, object]]
    memory_phases: MemoryPhases | None
    """None where the fit recorded none."""


class DataFile(NamedTuple):
    """One case file as it is now; ``cases`` is None where it can no longer be read."""

    name: str
    sha256: str
    cases: list[Case] | None


def read_facts(directory: Path) -> RunFacts:
    """Read a run directory's manifest and logs.

    Raises:
        ModelFileError: the manifest cannot be read.
    """
    path = directory / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path} cannot be read for the model card: {error}") from error
    if not isinstance(manifest, dict):
        raise ModelFileError(f"{path}: expected a JSON object, found {type(manifest).__name__}")
    config, training = manifest.get("config"), manifest.get("training")
    return RunFacts(
        manifest,
        config if isinstance(config, dict) else {},
        training if isinstance(training, dict) else {},
        _json_lines(directory / _TRAIN_LOG),
        _json_lines(directory / MEMORY_LOG),
        read_phases(directory),
    )


def _json_lines(path: Path) -> list[dict[str, object]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return []
    lines: list[dict[str, object]] = []
    for line in text.splitlines():
        try:
            value = json.loads(line)
        except ValueError:  # torn by a crash
            continue
        if isinstance(value, dict):
            lines.append(value)
    return lines


def data_files(value: object) -> list[DataFile]:
    """Read the case files that a configuration names, as they are now."""
    files = []
    for item in value if isinstance(value, list | tuple) else ():
        path = Path(str(item))
        try:
            files.append(DataFile(path.name, file_sha256(path), load_cases(path)))
        except (CaseFileError, DiskError):
            files.append(DataFile(path.name, UNKNOWN, None))
    return files

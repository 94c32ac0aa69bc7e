"""Resumable training state: written to a temporary directory, renamed, verified on load."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from so8t_eval.errors import ConfigError, DiskError, ModelFileError
from so8t_eval.file_hash import file_sha256
from so8t_train.random_state import RandomState

FORMAT_VERSION: Final = 2
"""2 added ``format_version``, ``state_sha256`` and CUDA generators; 1, without them, is read."""
_TENSORS = "state.safetensors"
_STATE = "state.json"
_PREFIX = "step-"


class Checkpoint(NamedTuple):
    """Everything the next optimizer step depends on.

    ``parameters`` and ``reference`` (rotation generators the inertia term is measured from) map
    names to float32 tensors; ``optimizer`` maps ``name/key`` to AdamW's state tensors. The learning
    rate and the position in the data follow from ``step``.
    """

    step: int
    config_hash: str
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    reference: dict[str, Tensor]
    random: RandomState
    first_loss: float | None = None
    """Loss of step 1, which an explosion is measured by."""
    session: str = ""
    """Id of the session that wrote it."""
    emergency: bool = False
    """Written because training failed, not because it was due."""
    processes: int = 1
    """How many computed its steps together."""
    settings: Mapping[str, Any] = {}
    """The settings that ``config_hash`` covers, to say which differ; older checkpoints have none."""


def save_checkpoint(directory: Path, checkpoint: Checkpoint, keep: int) -> Path:
    """Write ``directory/step-NNNNNN`` whole or not at all, then drop all but ``keep`` newest.

    Later steps than this one's, left by a damaged checkpoint that resuming passed over, are dropped
    too: otherwise they would count as newest and push out the good ones.

    Raises:
        DiskError: it could not be written; older checkpoints are untouched.
    """
    target = directory / f"{_PREFIX}{checkpoint.step:06d}"
    temporary = directory / f".{target.name}.tmp"
    tensors = {
        **{f"parameters/{k}": v for k, v in checkpoint.parameters.items()},
        **{f"optimizer/{k}": v for k, v in checkpoint.optimizer.items()},
        **{f"reference/{k}": v for k, v in checkpoint.reference.items()},
        "rng": checkpoint.random.cpu,
        **{f"cuda_rng/{k}": v for k, v in checkpoint.random.cuda.items()},
    }
    try:
        _clear_leftovers(directory)
        temporary.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / _TENSORS)
        state = {
            "format_version": FORMAT_VERSION,
            "step": checkpoint.step,
            "config_hash": checkpoint.config_hash,
            "first_loss": checkpoint.first_loss,
            "session": checkpoint.session,
            "emergency": checkpoint.emergency,
            "processes": checkpoint.processes,
            "settings": checkpoint.settings,
            "sha256": file_sha256(temporary / _TENSORS),
        }
        state["state_sha256"] = _state_sha256(state)
        (temporary / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            _flush(file)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
        _flush_directory(directory)  # else a power cut could undo the renaming
    except (OSError, DiskError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise DiskError(f"cannot write the checkpoint {target}: {error}") from error
    kept = checkpoint_directories(directory)
    newest = kept.index(target) + 1
    for old in kept[: max(0, newest - keep)] + kept[newest:]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def checkpoint_directories(directory: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    complete = (p for p in directory.glob(f"{_PREFIX}*") if (p / _STATE).is_file())
    return sorted(complete, key=lambda p: (len(p.name), p.name))


def load_checkpoint(path: Path) -> Checkpoint:
    """Read one checkpoint.

    Raises:
        ModelFileError: a file is missing or does not have the hash it was saved with.
        ConfigError: it is whole, and of a format that this version does not know.
    """
    try:
        state: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
        _check_state(path, state)
        found = file_sha256(path / _TENSORS)
        if found != state["sha256"]:
            raise ModelFileError(
                f"{path / _TENSORS} has changed since it was saved (expected sha256 "
                f"{state['sha256'][:12]}…, found {found[:12]}…); delete {path} to resume from an "
                "older checkpoint"
            )
        tensors = load_file(path / _TENSORS)
        step, config_hash, rng = int(state["step"]), str(state["config_hash"]), tensors["rng"]
        first_loss = state.get("first_loss")
    except (OSError, DiskError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"the checkpoint {path} cannot be read ({error}); delete it to resume from an older one"
        ) from error
    names = ("parameters", "optimizer", "reference", "cuda_rng")
    groups: dict[str, dict[str, Tensor]] = {name: {} for name in names}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        if name:
            groups[group][name] = tensor
    random = RandomState(rng, groups.pop("cuda_rng"))
    return Checkpoint(
        step,
        config_hash,
        **groups,
        random=random,
        first_loss=first_loss,
        session=str(state.get("session", "")),
        emergency=bool(state.get("emergency")),
        processes=int(state.get("processes", 1)),
        settings=state.get("settings") or {},
    )


def newest_checkpoint(
    directory: Path, warn: Callable[[str], None], *, required: bool = True
) -> Checkpoint | None:
    """The newest readable checkpoint; a damaged one is passed over, with a warning that names it.

    Raises:
        ModelFileError: there are checkpoints, none can be read, and one is ``required``.
        ConfigError: one is of a format that this version does not know.
    """
    problem: ModelFileError | None = None
    for path in reversed(checkpoint_directories(directory)):
        try:
            return load_checkpoint(path)
        except ModelFileError as error:
            warn(f"warning: damaged checkpoint passed over: {error}")
            problem = problem or error
    if problem is not None and required:
        raise problem
    return None


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str]
) -> dict[str, Tensor]:
    """AdamW's state as flat ``name/key`` tensors."""
    return {
        f"{names[cast(nn.Parameter, parameter)]}/{key}": value.detach().cpu().clone()
        for parameter, state in optimizer.state.items()
        for key, value in state.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, names: dict[nn.Parameter, str], tensors: dict[str, Tensor]
) -> None:
    """Put tensors saved by ``optimizer_tensors`` back."""
    for parameter, name in names.items():
        state = {
            key.removeprefix(f"{name}/"): value
            for key, value in tensors.items()
            if key.startswith(f"{name}/")
        }
        if state:
            optimizer.state[parameter] = {
                key: value.clone() if key == "step" else value.to(parameter.device).clone()
                for key, value in state.items()
            }


def _check_state(path: Path, state: dict[str, Any]) -> None:
    if not isinstance(state, dict):
        raise ValueError(f"{_STATE} is no JSON object")
    version = state.get("format_version", 1)
    if version == 1:
        return
    if state.get("state_sha256") != _state_sha256(state):
        raise ValueError(f"{_STATE} has changed since it was saved")
    if version != FORMAT_VERSION:
        raise ConfigError(
            f"{path / _STATE}: expected format_version {FORMAT_VERSION} or 1, found {version!r}; "
            "resume with the SO8T version that wrote it, or choose another output_dir"
        )


def _state_sha256(state: dict[str, Any]) -> str:
    covered = {key: value for key, value in state.items() if key != "state_sha256"}
    return hashlib.sha256(json.dumps(covered, sort_keys=True).encode()).hexdigest()


def _clear_leftovers(directory: Path) -> None:
    """Remove what a killed process left half written or half deleted."""
    torn = (p for p in directory.glob(f"{_PREFIX}*") if not (p / _STATE).is_file())
    for path in (*directory.glob(f".{_PREFIX}*.tmp"), *torn):
        shutil.rmtree(path, ignore_errors=True)


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())


def _flush_directory(directory: Path) -> None:
    if os.name == "nt":  # where directories cannot be opened
        return
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)

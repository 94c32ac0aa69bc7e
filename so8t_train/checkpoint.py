"""Resumable training state: written to a temporary directory, renamed, verified on load."""

import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from so8t_eval.errors import DiskError, ModelFileError
from so8t_eval.file_hash import file_sha256

_TENSORS = "state.safetensors"
_STATE = "state.json"
_PREFIX = "step-"


class Checkpoint(NamedTuple):
    """Everything the next optimizer step depends on.

    ``parameters`` and ``reference`` (rotation generators the inertia term is measured from) map
    names to float32 tensors; ``optimizer`` maps ``name/key`` to AdamW's state tensors.
    """

    step: int
    config_hash: str
    parameters: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    reference: dict[str, Tensor]
    rng: Tensor


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
        "rng": checkpoint.rng,
    }
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        save_file({k: v.contiguous() for k, v in tensors.items()}, temporary / _TENSORS)
        state = {
            "step": checkpoint.step,
            "config_hash": checkpoint.config_hash,
            "sha256": file_sha256(temporary / _TENSORS),
        }
        (temporary / _STATE).write_text(json.dumps(state, indent=1), encoding="utf-8")
        for file in temporary.iterdir():
            _flush(file)
        if target.exists():
            shutil.rmtree(target)
        temporary.replace(target)
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
    """
    try:
        state: dict[str, Any] = json.loads((path / _STATE).read_text(encoding="utf-8"))
        found = file_sha256(path / _TENSORS)
        if found != state["sha256"]:
            raise ModelFileError(
                f"{path / _TENSORS} has changed since it was saved (expected sha256 "
                f"{state['sha256'][:12]}…, found {found[:12]}…); delete {path} to resume from an "
                "older checkpoint"
            )
        tensors = load_file(path / _TENSORS)
        step, config_hash, rng = int(state["step"]), str(state["config_hash"]), tensors["rng"]
    except (OSError, DiskError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise ModelFileError(
            f"the checkpoint {path} cannot be read ({error}); delete it to resume from an older one"
        ) from error
    groups: dict[str, dict[str, Tensor]] = {"parameters": {}, "optimizer": {}, "reference": {}}
    for key, tensor in tensors.items():
        group, _, name = key.partition("/")
        if name:
            groups[group][name] = tensor
    return Checkpoint(step, config_hash, **groups, rng=rng)


def newest_checkpoint(directory: Path) -> Checkpoint | None:
    """The newest readable checkpoint; a damaged one is passed over for the one before it.

    Raises:
        ModelFileError: there are checkpoints, and none can be read.
    """
    problem: ModelFileError | None = None
    for path in reversed(checkpoint_directories(directory)):
        try:
            return load_checkpoint(path)
        except ModelFileError as error:
            problem = problem or error
    if problem is not None:
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


def _flush(file: Path) -> None:
    with file.open("rb+") as stream:
        os.fsync(stream.fileno())

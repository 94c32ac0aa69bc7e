"""Train a finished run further: what it must share with the new fit, and what the fit has moved."""

from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from so8t_eval.errors import ConfigError
from so8t_eval.file_hash import file_sha256
from so8t_train.base_model import BaseModelSource
from so8t_train.config import FitConfig
from so8t_train.run_dir import MANIFEST, RunManifest, load_parts, read_manifest
from so8t_train.safety_model import GateTensors, SafetyModel
from so8t_train.so8_rotation import geodesic_distance_squared, rotation_from_generators
from so8t_train.training_data import TrainingExample

REFERENCE: Final = "reference"
_MUST_AGREE: Final = ("lora_r", "lora_alpha", "lora_target_modules", "rotation_gates")


class Origin(NamedTuple):
    """The run a fit starts from: its manifest and rotations, and the hash that names it."""

    manifest: RunManifest
    gates: GateTensors | None
    sha256: str


class Movement(NamedTuple):
    """What a continued fit changed, for the manifest, the model card and the terminal.

    Rotation drift is the geodesic distance of one layer's rotation from where it started, root
    mean square over its blocks, radians.
    """

    safe_drift_per_layer: list[float]
    command_drift_per_layer: list[float]
    dev_flips: dict[str, list[str]]
    """Ids of dev cases by direction, as in ``refuse to allow``; empty without a dev split."""


def origin_directory(config: FitConfig) -> Path | None:
    """The run directory that ``init_from`` names, ``reference`` being the shipped one.

    Raises:
        ConfigError: there is no such directory.
    """
    if config.init_from is None:
        return None
    if str(config.init_from) == REFERENCE:
        from so8t_train.reference_model import RUN_DIRECTORY

        return RUN_DIRECTORY
    if not config.init_from.is_dir():
        raise ConfigError(
            f"init_from: {config.init_from} is no directory; give a run directory of so8t-train "
            f"fit, or {REFERENCE}"
        )
    return config.init_from


def check_origin(directory: Path, source: BaseModelSource, config: FitConfig) -> RunManifest:
    """Read the run to start from, and compare what must be equal, before the base is loaded.

    Raises:
        ConfigError: another base model, LoRA shape or gates than ``config`` asks for.
        ModelFileError: an incomplete or altered run.
    """
    manifest = read_manifest(directory)
    if manifest.base_sha256 != source.sha256:
        raise ConfigError(
            f"init_from: {directory} was trained on {manifest.base_model} (sha256 "
            f"{manifest.base_sha256[:12]}…), base_model is {source.name} ({source.sha256[:12]}…); "
            "give the same base_model"
        )
    for key in _MUST_AGREE:
        theirs, ours = getattr(manifest.config, key), getattr(config, key)
        if theirs != ours:
            raise ConfigError(
                f"{key}: expected {theirs!r} as in {directory / MANIFEST}, found {ours!r}; a run "
                "continues with the shape it has"
            )
    return manifest


def start_from(directory: Path, manifest: RunManifest, model: SafetyModel) -> Origin:
    """Put the run's LoRA, rotations and verdict rows into a fresh model.

    The run's temperature, which its own fit found, is taken over for models whose verdict rows
    stay as they are.
    """
    load_parts(directory, model)
    model.temperature = manifest.temperature
    return Origin(manifest, model.gate_tensors(), file_sha256(directory / MANIFEST))


def movement(
    origin: Origin,
    now: GateTensors | None,
    dev: Sequence[TrainingExample],
    before: npt.NDArray[np.float64] | None,
    after: npt.NDArray[np.float64] | None,
) -> Movement:
    """Compare rotations, and the verdicts of logits (n, 3) before and after, on ``dev``."""
    safe, command = [], []
    if origin.gates is not None and now is not None:
        safe = _drift(origin.gates.safe, now.safe)
        command = _drift(origin.gates.command, now.command)
    flips: dict[str, list[str]] = {}
    if before is not None and after is not None:
        names = ("allow", "escalate", "refuse")
        pairs = zip(dev, before.argmax(axis=1), after.argmax(axis=1), strict=True)
        for example, old, new in pairs:
            if old != new:
                flips.setdefault(f"{names[old]} to {names[new]}", []).append(example.id)
    return Movement(safe, command, flips)


def movement_line(moved: Movement) -> str:
    """One line for the terminal."""
    flips = {key: len(ids) for key, ids in moved.dev_flips.items()}
    shown = ", ".join(f"{key} {n}" for key, n in sorted(flips.items())) or "none"
    safe, command = (
        max(drift, default=0.0)
        for drift in (moved.safe_drift_per_layer, moved.command_drift_per_layer)
    )
    return (
        f"moved: largest rotation drift of a layer {safe:.4f} rad (R_safe), {command:.4f} rad "
        f"(R_cmd); dev verdict flips: {shown}"
    )


def _drift(before: Tensor, after: Tensor) -> list[float]:
    """Root-mean-square geodesic distance of each layer, radians, of generators (layers, blocks, 28)."""
    with torch.no_grad():
        squares = [
            geodesic_distance_squared(rotation_from_generators(a), rotation_from_generators(b))
            for a, b in zip(before.double(), after.double(), strict=True)
        ]
    return [round(float(square.mean().sqrt()), 6) for square in squares]

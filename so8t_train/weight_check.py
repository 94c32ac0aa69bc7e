"""Recompute every merged weight from the run's files and the base, independently of the exporter.

Shares no arithmetic with ``fold`` and ``merged_model``: files are read again, exponentials go
through an eigendecomposition in numpy, LoRA factors are applied one by one. So a rotation taken
transposed, in the wrong order or not at all, or a LoRA update left out, shows as a residual.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Final, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from safetensors.numpy import load_file
from torch import Tensor

from so8t_train.lazy_weights import LazyWeights, row_blocks, rows_of, shape_of
from so8t_train.run_dir import ADAPTER_CONFIG, ADAPTER_TENSORS, SAFETY_TENSORS

FloatArray: TypeAlias = npt.NDArray[np.float64]
_PREFIX: Final = "base_model.model."


class RotationCheck(NamedTuple):
    """One layer's rotations: worst and mean over blocks, in Frobenius norm (float64)."""

    module: str
    safe_orthogonality: float
    command_orthogonality: float
    orthogonality: float
    determinant_error: float
    commutator_max: float
    commutator_mean: float


class WeightCheck(NamedTuple):
    """Residual of one merged tensor, relative to the norm of what it must be."""

    name: str
    residual: float


class RunTensors(NamedTuple):
    """The run's tensors as numpy reads them, LoRA factors by module name."""

    lora: dict[str, tuple[FloatArray, FloatArray]]
    scale: float
    safe: FloatArray | None
    command: FloatArray | None
    verdict_rows: FloatArray
    verdict_input_rows: FloatArray | None


def read_run_tensors(directory: Path) -> RunTensors:
    """Read adapter and safety tensors of a run directory."""
    adapter = load_file(directory / ADAPTER_TENSORS)
    modules = sorted({key.removeprefix(_PREFIX).rsplit(".lora_", 1)[0] for key in adapter})
    lora = {
        module: (
            adapter[f"{_PREFIX}{module}.lora_A.weight"].astype(np.float64),
            adapter[f"{_PREFIX}{module}.lora_B.weight"].astype(np.float64),
        )
        for module in modules
    }
    config = json.loads((directory / ADAPTER_CONFIG).read_text(encoding="utf-8"))
    power = 0.5 if config.get("use_rslora") else 1.0
    safety = {k: v.astype(np.float64) for k, v in load_file(directory / SAFETY_TENSORS).items()}
    return RunTensors(
        lora,
        config["lora_alpha"] / math.pow(config["r"], power),
        safety.get("safe_generators"),
        safety.get("command_generators"),
        safety["verdict_rows"],
        safety.get("verdict_input_rows"),
    )


def exponential(generators: FloatArray) -> FloatArray:
    """exp(A) (…, 8, 8) of skew A with upper triangle ``generators`` (…, 28), by eigenvectors.

    Source: A = iH with H Hermitian, so exp(A) = V diag(e^{iλ}) V* (spectral theorem).
    """
    row, column = np.triu_indices(8, 1)
    skew = np.zeros((*generators.shape[:-1], 8, 8))
    skew[..., row, column] = generators
    skew -= skew.swapaxes(-1, -2)
    values, vectors = np.linalg.eigh(-1j * skew)
    turned = vectors * np.exp(1j * values)[..., None, :]
    rotation: FloatArray = (turned @ vectors.conj().swapaxes(-1, -2)).real
    return rotation


def check_rotations(tensors: RunTensors, modules: list[str]) -> list[RotationCheck]:
    """Orthogonality, determinant and commutator of every layer's rotations; [] without gates."""
    if tensors.safe is None or tensors.command is None:
        return []
    return [
        _check_layer(module, exponential(safe), exponential(command))
        for module, safe, command in zip(modules, tensors.safe, tensors.command, strict=True)
    ]


def check_weights(
    tensors: RunTensors,
    base: LazyWeights,
    merged: Mapping[str, Tensor],
    modules: list[str],
    temperature: float,
) -> list[WeightCheck]:
    """Residual ‖W' − G(W + ΔW)‖ / ‖G(W + ΔW)‖ of every merged tensor, in the order of ``base``.

    ``base`` are the weights merged into, ``modules`` the gated projections in layer order. A tensor
    that is missing or of another shape has an infinite residual.
    """
    rotations: dict[str, FloatArray] = {}
    if tensors.safe is not None and tensors.command is not None:
        for i, module in enumerate(modules):
            rotations[module] = exponential(tensors.command[i]) @ exponential(tensors.safe[i])
    checks = [
        WeightCheck(
            name,
            _residual(tensors, rotations, name, base=base, merged=merged, temperature=temperature),
        )
        for name in base.shapes
    ]
    return checks + [WeightCheck(name, math.inf) for name in merged if name not in base]


def _residual(
    tensors: RunTensors,
    rotations: Mapping[str, FloatArray],
    name: str,
    *,
    base: LazyWeights,
    merged: Mapping[str, Tensor],
    temperature: float,
) -> float:
    added = _added_rows(tensors, name, temperature)
    last, *rest = base.shapes[name]
    shape = (last + len(added), *rest)
    if name not in merged or shape_of(merged, name) != shape:
        return math.inf
    differences, norms = [0.0], [0.0]
    for start, stop in row_blocks(shape):
        found = rows_of(merged, name, start, stop)
        weight = base.rows(name, min(start, last), min(stop, last))
        expected = _expected(tensors, rotations, name, weight, start)
        if expected is None and not len(added):
            if not torch.equal(found, weight):  # untouched: the same numbers
                return math.inf
            continue
        value = weight.numpy().astype(np.float64) if expected is None else expected
        if len(added):
            value = np.vstack([value, added[max(start - last, 0) : max(stop - last, 0)]])
        differences.append(float(np.linalg.norm(found.numpy().astype(np.float64) - value)))
        norms.append(float(np.linalg.norm(value)))
    return math.hypot(*differences) / max(math.hypot(*norms), float(np.finfo(np.float32).tiny))


def _expected(
    tensors: RunTensors,
    rotations: Mapping[str, FloatArray],
    name: str,
    weight: Tensor,
    start: int,
) -> FloatArray | None:
    """What the rows from ``start`` on must be; None: what they are in the base."""
    module = name.rpartition(".")[0]
    stop = start + len(weight)
    is_weight = name.endswith(".weight")
    if module not in rotations and not (is_weight and module in tensors.lora):
        return None
    value = weight.numpy().astype(np.float64)
    if is_weight and module in tensors.lora:
        a, b = tensors.lora[module]
        value += (b[start:stop] * tensors.scale) @ a
    if module in rotations:
        rotation = rotations[module][start // 8 : stop // 8]
        parts = value.reshape(rotation.shape[0], 8, -1)
        value = np.einsum("bij,bjk->bik", rotation, parts, optimize=True).reshape(value.shape)
    return value


def _added_rows(tensors: RunTensors, name: str, temperature: float) -> FloatArray:
    module = name.rpartition(".")[0]
    if module == "model.embed_tokens" and tensors.verdict_input_rows is not None:
        return tensors.verdict_input_rows
    if module not in ("model.embed_tokens", "lm_head"):
        return np.zeros((0, 0))
    own = tensors.verdict_rows
    added: FloatArray = own / temperature + own.mean(axis=0) * (1 - 1 / temperature)
    return added


def _check_layer(module: str, safe: FloatArray, command: FloatArray) -> RotationCheck:
    composed = command @ safe
    commutators = _norms(composed - safe @ command)
    determinants = [np.abs(np.linalg.det(R) - 1).max() for R in (safe, command, composed)]
    return RotationCheck(
        module,
        _orthogonality(safe),
        _orthogonality(command),
        _orthogonality(composed),
        float(max(determinants)),
        float(commutators.max()),
        float(commutators.mean()),
    )


def _orthogonality(rotation: FloatArray) -> float:
    return float(_norms(rotation.swapaxes(-1, -2) @ rotation - np.eye(8)).max())


def _norms(matrices: FloatArray) -> FloatArray:
    norms: FloatArray = np.linalg.norm(matrices, axis=(-2, -1))
    return norms

"""Fold LoRA and rotation gates into plain weights: W' = G (W + s·B·A), b' = G b. Pure, float64."""

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from so8t_train.so8_rotation import BLOCK_SIZE, GENERATOR_SIZE, compose, rotation_from_generators


class LoraPair(NamedTuple):
    """The factors of one LoRA update: ``a`` (rank, in), ``b`` (out, rank)."""

    a: Float[Tensor, "rank in"]
    b: Float[Tensor, "out rank"]


def composed_rotations(
    safe: Float[Tensor, "layers blocks 28"], command: Float[Tensor, "layers blocks 28"]
) -> Float[Tensor, "layers blocks 8 8"]:
    """G = R_cmd · R_safe of every layer, exponentials and product in float64."""
    flat = [g.reshape(-1, GENERATOR_SIZE).double() for g in (command, safe)]
    rotations = compose(rotation_from_generators(flat[0]), rotation_from_generators(flat[1]))
    return rotations.reshape(*safe.shape[:2], BLOCK_SIZE, BLOCK_SIZE)


def lora_delta(pair: LoraPair, scale: float) -> Float[Tensor, "out in"]:
    """ΔW = s · B · A, float64."""
    return scale * (pair.b.double() @ pair.a.double())


def rotate_rows(
    rotation: Float[Tensor, "blocks 8 8"], matrix: Float[Tensor, "out *in"]
) -> Float[Tensor, "out *in"]:
    """G · matrix (or G · vector), float64: blocks of eight output features are mixed."""
    blocks = matrix.double().reshape(rotation.shape[0], BLOCK_SIZE, -1)
    return torch.bmm(rotation.double(), blocks).reshape(matrix.shape)


def folded_weights(
    weights: Mapping[str, Tensor],
    lora: Mapping[str, LoraPair],
    scale: float,
    rotations: Mapping[str, Tensor],
) -> Iterator[tuple[str, Tensor]]:
    """Yield ``(name, float64 tensor)`` of every weight and bias that LoRA or a gate changes.

    ``lora`` and ``rotations`` go by module name (``model.layers.0.self_attn.o_proj``), ``weights``
    by parameter name (that + ``.weight``, ``.bias``).

    Raises:
        KeyError: a module has no weight in ``weights``.
    """
    for module in sorted(set(lora) | set(rotations)):
        weight = weights[f"{module}.weight"].double()
        if module in lora:
            weight = weight + lora_delta(lora[module], scale)
        bias = weights.get(f"{module}.bias")
        if module in rotations:
            weight = rotate_rows(rotations[module], weight)
            if bias is not None:
                yield f"{module}.bias", rotate_rows(rotations[module], bias)
        yield f"{module}.weight", weight


def calibrated_rows(
    rows: Float[Tensor, "3 hidden"], temperature: float
) -> Float[Tensor, "3 hidden"]:
    """Verdict rows whose plain softmax is the one at ``temperature``: m + (r − m) / T, float64.

    m is the rows' mean. A softmax does not see what all its logits share, so this gives exactly
    the probabilities of r / T. Of all such rows these are nearest to r (least squares): with tied
    embeddings the same rows are what a reply reads after its verdict, and the logits keep their
    level against the ordinary vocabulary, so the verdict stays the greedy first token.

    Source: temperature scaling, Guo et al., "On Calibration of Modern Neural Networks", ICML 2017.
    """
    wide = rows.double()
    mean = wide.mean(dim=0, keepdim=True)
    return mean + (wide - mean) / temperature

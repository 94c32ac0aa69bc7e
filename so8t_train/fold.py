"""Fold LoRA and rotation gates into plain weights: W' = G (W + s·B·A), b' = G b. Pure, float64."""

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


def rotate_rows(
    rotation: Float[Tensor, "blocks 8 8"], matrix: Float[Tensor, "out *in"]
) -> Float[Tensor, "out *in"]:
    """G · matrix (or G · vector), float64: blocks of eight output features are mixed."""
    blocks = matrix.double().reshape(rotation.shape[0], BLOCK_SIZE, -1)
    return torch.bmm(rotation.double(), blocks).reshape(matrix.shape)


def folded_rows(
    rows: Float[Tensor, "part *in"],
    start: int,
    lora: LoraPair | None,
    scale: float,
    rotation: Float[Tensor, "blocks 8 8"] | None,
) -> Float[Tensor, "part *in"]:
    """G (W + s·B·A), or G b, for the rows from ``start`` on of a weight or bias, float64.

    ``lora`` and ``rotation`` are the whole layer's; with a rotation ``start`` and the number of
    rows are multiples of eight.
    """
    stop = start + rows.shape[0]
    value = rows.double()
    if lora is not None:  # added in place by the product, which spares two passes
        value.addmm_(lora.b[start:stop].double(), lora.a.double(), alpha=scale)
    if rotation is not None:
        value = rotate_rows(rotation[start // BLOCK_SIZE : stop // BLOCK_SIZE], value)
    return value


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

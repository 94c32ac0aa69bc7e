"""Rotations in SO(8) from 28 generators each: exponential, composition, distances. Pure functions.

Everything is batched over a leading ``blocks`` axis; blocks of many layers go in one call. Internal
arithmetic is float64 whatever the input, so that a result rounded to float32 still has RᵀR = I and
det R = 1 within 1e-6. In float32 alone neither route gets there: the error of the exponential is
1e-6 at generator std 0.01 and 2e-5 at std 3, that of a Cayley solve 2e-6 at std 3.
"""

# Not `from __future__ import annotations`: jaxtyping reads the annotations when functions are made.
import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

BLOCK_SIZE = 8
GENERATOR_SIZE = 28


def skew_from_generators(g: Float[Tensor, "blocks 28"]) -> Float[Tensor, "blocks 8 8"]:
    """Skew-symmetric A in the dtype of ``g``: ``g`` is its upper triangle, row by row."""
    row, column = torch.triu_indices(BLOCK_SIZE, BLOCK_SIZE, 1, device=g.device)
    upper = g.new_zeros(g.shape[0], BLOCK_SIZE, BLOCK_SIZE)
    upper[:, row, column] = g
    return upper - upper.mT


def rotation_from_generators(g: Float[Tensor, "blocks 28"]) -> Float[Tensor, "blocks 8 8"]:
    """R = exp(A): float64 for float64 generators, float32 for every narrower dtype. Differentiable.

    The exponential is chosen over the Cayley transform (I - A/2)⁻¹(I + A/2). Measured for 4320
    blocks (72 blocks × 30 layers × 2 rotations) in float64 on one CPU core, forward + backward:
    exponential 15 + 120 ms, Cayley 5 + 16 ms. As this runs once per optimizer step, 0.1 s buys what
    Cayley lacks: every rotation is reached at a finite generator (half turns included), and |A| is
    the geodesic length of the rotation, so learning rates and the inertia penalty mean angles.

    Source: scaling and squaring with Taylor polynomials, Bader, Blanes and Casas, "Computing the
    matrix exponential with an optimized Taylor polynomial approximation" (Mathematics 7(12), 2019),
    as in ``torch.linalg.matrix_exp``.
    """
    rotation: Tensor = torch.linalg.matrix_exp(skew_from_generators(_widened(g)))
    return rotation.to(device=g.device, dtype=torch.promote_types(g.dtype, torch.float32))


def compose(
    R_cmd: Float[Tensor, "blocks 8 8"], R_safe: Float[Tensor, "blocks 8 8"]
) -> Float[Tensor, "blocks 8 8"]:
    """G = R_cmd · R_safe in the dtype of ``R_cmd``: a vector meets the safety rotation first."""
    # The product is taken in float64: TF32, where a trainer turns it on, would break RᵀR = I.
    return (_widened(R_cmd) @ _widened(R_safe)).to(device=R_cmd.device, dtype=R_cmd.dtype)


def orthogonality_error(R: Float[Tensor, "blocks 8 8"]) -> Float[Tensor, " blocks"]:
    """‖RᵀR − I‖_F of each block, float64."""
    wide = _widened(R)
    identity = torch.eye(BLOCK_SIZE, dtype=wide.dtype, device=wide.device)
    return _frobenius(wide.mT @ wide - identity)


def determinant_error(R: Float[Tensor, "blocks 8 8"]) -> Float[Tensor, " blocks"]:
    """|det R − 1| of each block, float64: 2 for a reflection."""
    determinant: Tensor = torch.linalg.det(_widened(R))
    return (determinant - 1).abs()


def commutator_norm(
    R_cmd: Float[Tensor, "blocks 8 8"], R_safe: Float[Tensor, "blocks 8 8"]
) -> Float[Tensor, " blocks"]:
    """‖R_cmd R_safe − R_safe R_cmd‖_F of each block, float64: 0 where the order does not matter.

    Reduce it with ``.mean()`` or ``.max()``. Two separately rounded float32 rotations that commute
    exactly still give about 1e-7.
    """
    command, safe = _widened(R_cmd), _widened(R_safe)
    return _frobenius(command @ safe - safe @ command)


def geodesic_distance_squared(
    R_prev: Float[Tensor, "blocks 8 8"], R: Float[Tensor, "blocks 8 8"]
) -> Float[Tensor, " blocks"]:
    """‖log(R_prevᵀ R)‖²_F of each block, in rad², float64: Σ θ² over the eight eigenangles.

    Both arguments must be rotations. The gradient is 2 R log(R_prevᵀ R) for ``R`` (and the mirrored
    one for ``R_prev``), exactly 0 where the two are equal. Where a plane is turned by exactly π the
    distance is right but not differentiable; that plane then contributes a finite gradient.

    Source: distance and gradient, Moakher, "Means and Averaging in the Group of Rotations" (SIAM
    J. Matrix Anal. Appl. 24(1), 2002); stated there for SO(3), both hold for SO(n) with its
    bi-invariant metric. The logarithm is computed through a shifted Cayley transform.
    """
    distance: Tensor = _GeodesicDistanceSquared.apply(R_prev, R)  # type: ignore[no-untyped-call]
    return distance


class _Logarithm(NamedTuple):
    angles: Float[Tensor, "blocks 8"]  # in [-π, π)
    matrix: Float[Tensor, "blocks 8 8"]  # skew-symmetric


def _logarithm(Q: Float[Tensor, "blocks 8 8"]) -> _Logarithm:
    """Eigenangles and principal logarithm of float64 rotations, accurate at every angle.

    K = i(I − e^{-iφ}Q)(I + e^{-iφ}Q)⁻¹ is Hermitian with eigenvalues tan((θ−φ)/2) and the
    eigenvectors of Q, so ``eigh`` yields an orthonormal basis even for repeated angles (the
    identity is all repeated angles), where ``eig`` of Q need not. φ puts the pole of the tangent in
    the middle of the widest gap between eigenangles: at least π/8 from each, so |K| ≤ 5.1.

    Source: Cayley transform between unitary and Hermitian matrices (Horn and Johnson, "Matrix
    Analysis"); the shift φ removes its pole at the eigenvalue −1.
    """
    shift = _angle_opposite_widest_gap(Q)[:, None, None]
    identity = torch.eye(BLOCK_SIZE, dtype=torch.complex128, device=Q.device)
    turned = torch.polar(torch.ones_like(shift), -shift) * Q
    K = 1j * torch.linalg.solve(identity + turned, identity - turned)
    tangents, vectors = torch.linalg.eigh((K + K.mH) / 2)
    angles = 2 * torch.atan(tangents) + shift[:, :, 0]
    angles = torch.remainder(angles + math.pi, 2 * math.pi) - math.pi
    matrix = ((vectors * (1j * angles)[:, None, :]) @ vectors.mH).real
    return _Logarithm(angles, (matrix - matrix.mT) / 2)


def _angle_opposite_widest_gap(Q: Float[Tensor, "blocks 8 8"]) -> Float[Tensor, " blocks"]:
    # Cosines suffice here: their poor resolution near 0 and π only moves the middle of a wide gap.
    angles = torch.linalg.eigvalsh((Q + Q.mT) / 2).clamp(-1, 1).acos()
    circle = torch.cat([angles, -angles], dim=1).sort(dim=1).values
    following = torch.cat([circle[:, 1:], circle[:, :1] + 2 * math.pi], dim=1)
    gap, index = (following - circle).max(dim=1)
    return circle.gather(1, index[:, None])[:, 0] + gap / 2 - math.pi


class _GeodesicDistanceSquared(torch.autograd.Function):
    """Analytic gradient: autograd through ``eigh`` is undefined for repeated eigenvalues."""

    @staticmethod
    def forward(ctx: FunctionCtx, R_prev: Tensor, R: Tensor) -> Tensor:
        previous, current = _widened(R_prev), _widened(R)
        logarithm = _logarithm(previous.mT @ current)
        # Equal rotations are exactly 0 apart, however this machine rounds the product above.
        moved = (previous != current).any(dim=2).any(dim=1)
        log_matrix = torch.where(moved[:, None, None], logarithm.matrix, 0.0)
        ctx.save_for_backward(R_prev, R, log_matrix)
        return torch.where(moved, logarithm.angles.square().sum(dim=1), 0.0).to(R.device)

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, grad: Tensor) -> tuple[Tensor, Tensor]:
        R_prev, R, log_matrix = ctx.saved_tensors  # type: ignore[attr-defined]
        scaled = 2 * grad.to(log_matrix)[:, None, None] * log_matrix
        return -(_widened(R_prev) @ scaled).to(R_prev), (_widened(R) @ scaled).to(R)


def _frobenius(matrix: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.matrix_norm(matrix)
    return norm


def _widened(matrix: Tensor) -> Tensor:
    # Apple's MPS has no float64; these matrices are small enough to visit the CPU.
    device = torch.device("cpu") if matrix.device.type == "mps" else matrix.device
    return matrix.to(device=device, dtype=torch.float64)

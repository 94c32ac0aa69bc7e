"""Rotations: exactness at every generator size and dtype, order, and the geodesic distance."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.linalg import logm

from so8t_train.so8_rotation import (
    GENERATOR_SIZE,
    commutator_norm,
    compose,
    determinant_error,
    geodesic_distance_squared,
    orthogonality_error,
    rotation_from_generators,
    skew_from_generators,
)

TOLERANCE = 1e-6
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
sizes = st.floats(min_value=-6, max_value=1.5).map(lambda exponent: 10.0**exponent)
seeds = st.integers(0, 2**31 - 1)


def drawn(seed: int, size: float, blocks: int = 16, dtype=torch.float64) -> torch.Tensor:
    rng = torch.Generator().manual_seed(seed)
    return (size * torch.randn(blocks, GENERATOR_SIZE, generator=rng, dtype=torch.float64)).to(
        dtype
    )


def plane_rotation(*angles: float) -> torch.Tensor:
    """One block turning planes (0,1), (2,3), (4,5), (6,7) by the given angles."""
    rotation = torch.eye(8, dtype=torch.float64)
    for plane, angle in enumerate(angles):
        i = 2 * plane
        cosine, sine = math.cos(angle), math.sin(angle)
        turn = [[cosine, -sine], [sine, cosine]]
        rotation[i : i + 2, i : i + 2] = torch.tensor(turn, dtype=torch.float64)
    return rotation[None]


def identity(blocks: int = 1) -> torch.Tensor:
    return torch.eye(8, dtype=torch.float64).repeat(blocks, 1, 1)


def test_generators_are_the_upper_triangle_row_by_row():
    A = skew_from_generators(torch.arange(1.0, 29.0)[None])[0]
    assert torch.equal(A, -A.T)
    assert A[0].tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert A[1, 2:].tolist() == [8, 9, 10, 11, 12, 13]
    assert A[6, 7] == 28


@pytest.mark.parametrize("dtype", DTYPES)
@settings(max_examples=40, deadline=None)
@given(seed=seeds, size=sizes)
def test_rotation_is_orthogonal_with_determinant_one(dtype, seed, size):
    R_safe = rotation_from_generators(drawn(seed, size, dtype=dtype))
    R_cmd = rotation_from_generators(drawn(seed + 1, size, dtype=dtype))
    assert R_safe.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    for rotation in (R_safe, R_cmd, compose(R_cmd, R_safe)):
        assert orthogonality_error(rotation).max() < TOLERANCE
        assert determinant_error(rotation).max() < TOLERANCE


@settings(max_examples=40, deadline=None)
@given(seed=seeds, size=sizes)
def test_negated_generators_give_the_inverse(seed, size):
    g = drawn(seed, size)
    product = rotation_from_generators(-g) @ rotation_from_generators(g)
    torch.testing.assert_close(product, identity(16), rtol=0, atol=1e-11)


def test_exponential_of_one_plane_is_the_plane_rotation():
    g = torch.zeros(1, GENERATOR_SIZE, dtype=torch.float64)
    g[0, 0] = -0.7
    torch.testing.assert_close(rotation_from_generators(g), plane_rotation(0.7))


def test_measures_see_what_is_not_a_rotation():
    reflection = identity()
    reflection[0, 0, 0] = -1
    assert orthogonality_error(reflection).item() == 0
    assert determinant_error(reflection).item() == 2
    assert orthogonality_error(1.1 * identity()).item() == pytest.approx(0.21 * math.sqrt(8))


def test_bound_separates_the_exponential_from_a_truncated_neumann_series():
    g = drawn(0, 0.3, blocks=72, dtype=torch.float32)
    half = skew_from_generators(g) / 2
    one = torch.eye(8)
    inverse = one + half + half @ half + half @ half @ half
    assert orthogonality_error(inverse @ (one + half)).max() > 1.0
    assert orthogonality_error(rotation_from_generators(g)).max() < TOLERANCE


def test_order_is_command_after_safe():
    R_safe, R_cmd = (rotation_from_generators(drawn(seed, 0.5)) for seed in (1, 2))
    x = torch.randn(16, 8, 1, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    safety_first = R_cmd @ (R_safe @ x)
    torch.testing.assert_close(compose(R_cmd, R_safe) @ x, safety_first)
    assert (compose(R_safe, R_cmd) @ x - safety_first).abs().max() > 0.1


def test_commutator_is_zero_only_where_order_does_not_matter():
    R_safe, R_cmd = (rotation_from_generators(drawn(seed, 0.5)) for seed in (1, 2))
    assert commutator_norm(R_safe, R_safe).max() == 0
    assert commutator_norm(plane_rotation(0.3), plane_rotation(0.0, 0.9)).max() == 0
    assert commutator_norm(R_cmd, R_safe).shape == (16,)
    assert commutator_norm(R_cmd, R_safe).min() > 0.1


@pytest.mark.parametrize("size", [0.0, 1e-6, 0.3, 10.0])
def test_gradient_of_the_exponential(size):
    g = drawn(5, size, blocks=2).requires_grad_()
    assert torch.autograd.gradcheck(rotation_from_generators, (g,), atol=1e-5)


@pytest.mark.parametrize("angle", [0.0, 1e-8, 0.5, 3.0, math.pi - 1e-9, math.pi])
def test_distance_of_one_plane_is_twice_its_squared_angle(angle):
    axes = rotation_from_generators(drawn(8, 1.0, blocks=1))
    R = axes @ plane_rotation(angle, 0.0, 0.4, -0.4) @ axes.mT
    expected = 2 * angle**2 + 4 * 0.4**2
    distance = geodesic_distance_squared(identity(), R)
    assert distance.item() == pytest.approx(expected, rel=1e-12)


def test_distance_gradient_next_to_a_half_turn():
    axes = rotation_from_generators(drawn(8, 1.0, blocks=1))
    R = (axes @ plane_rotation(math.pi - 1e-9, 0.0, 0.4, -0.4) @ axes.mT).requires_grad_()
    geodesic_distance_squared(identity(), R).sum().backward()
    log = torch.zeros(8, 8, dtype=torch.float64)
    for plane, angle in enumerate([math.pi - 1e-9, 0.0, 0.4, -0.4]):
        log[2 * plane + 1, 2 * plane], log[2 * plane, 2 * plane + 1] = angle, -angle
    expected = 2 * R.detach() @ (axes @ log @ axes.mT)
    torch.testing.assert_close(R.grad, expected, rtol=0, atol=1e-7)


@settings(max_examples=20, deadline=None)
@given(seed=seeds, size=sizes)
def test_distance_agrees_with_an_independent_logarithm(seed, size):
    R_prev = rotation_from_generators(drawn(seed, 1.0, blocks=1))
    R = rotation_from_generators(drawn(seed + 1, size, blocks=1)) @ R_prev
    expected = torch.linalg.matrix_norm(torch.tensor(logm((R_prev.mT @ R)[0].numpy()))) ** 2
    distance = geodesic_distance_squared(R_prev, R)[0]
    torch.testing.assert_close(distance, expected.double(), rtol=1e-6, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=seeds, size=st.floats(-6, -0.5).map(lambda exponent: 10.0**exponent))
def test_distance_from_identity_is_the_generator_norm(seed, size):
    g = drawn(seed, size).requires_grad_()
    distance = geodesic_distance_squared(identity(16), rotation_from_generators(g))
    (gradient,) = torch.autograd.grad(distance.sum(), g)
    torch.testing.assert_close(distance, 2 * g.detach().square().sum(1), rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, 4 * g.detach(), rtol=1e-4, atol=1e-6 * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [0.0, 0.3, 10.0])
def test_distance_to_itself_has_zero_gradient(dtype, size):
    g = drawn(4, size, dtype=dtype).requires_grad_()
    R = rotation_from_generators(g)
    R.retain_grad()
    distance = geodesic_distance_squared(R.detach(), R)
    distance.sum().backward()
    assert torch.equal(distance, torch.zeros(16, dtype=torch.float64))
    assert torch.equal(R.grad, torch.zeros_like(R))
    assert torch.equal(g.grad, torch.zeros_like(g))


@pytest.mark.parametrize("size", [1e-3, 0.3, 1.0])
def test_distance_gradient_for_both_arguments(size):
    start = drawn(6, 0.5, blocks=2).requires_grad_()
    end = (drawn(6, 0.5, blocks=2) + drawn(7, size, blocks=2)).requires_grad_()

    def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return geodesic_distance_squared(rotation_from_generators(a), rotation_from_generators(b))

    assert torch.autograd.gradcheck(distance, (start, end), atol=1e-5)


def test_distance_gradient_with_all_angles_repeated():
    g = torch.zeros(1, GENERATOR_SIZE, dtype=torch.float64)
    g[0, [0, 13, 22, 27]] = 1.2  # planes (0,1), (2,3), (4,5), (6,7): one angle, four times
    g.requires_grad_()
    geodesic_distance_squared(identity(), rotation_from_generators(g)).sum().backward()
    torch.testing.assert_close(g.grad, 4 * g.detach())


def test_distance_gradient_at_half_turns_is_finite():
    R = plane_rotation(math.pi, math.pi, 0.1).requires_grad_()
    geodesic_distance_squared(identity(), R).sum().backward()
    assert torch.isfinite(R.grad).all()
    assert R.grad.abs().max() > 0.1

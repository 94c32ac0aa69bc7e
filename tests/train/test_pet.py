"""PET: the temporal term against a brute-force loop, the phases, the inertia term."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t_train.pet import inertia_penalty, pet_weight, temporal_penalty
from so8t_train.so8_rotation import rotation_from_generators


def brute_force(y: torch.Tensor, segments: torch.Tensor) -> float:
    squares = []
    for row, ids in zip(y.tolist(), segments.tolist(), strict=True):
        for t in range(1, len(row) - 1):
            if ids[t] > 0 and ids[t - 1] == ids[t] == ids[t + 1]:
                for before, here, after in zip(row[t - 1], row[t], row[t + 1], strict=True):
                    squares.append((after - 2 * here + before) ** 2)
    return sum(squares) / len(squares) if squares else 0.0


@settings(max_examples=100, deadline=None)
@given(
    segments=st.integers(0, 9).flatmap(
        lambda seq: st.lists(
            st.lists(st.integers(0, 3), min_size=seq, max_size=seq), min_size=1, max_size=3
        )
    ),
    seed=st.integers(0, 2**31 - 1),
)
def test_temporal_penalty_equals_the_loop(segments, seed):
    ids = torch.tensor(segments, dtype=torch.int64).reshape(len(segments), -1)
    rng = torch.Generator().manual_seed(seed)
    y = torch.randn(*ids.shape, 5, generator=rng, dtype=torch.float64)
    assert temporal_penalty(y, ids).item() == pytest.approx(brute_force(y, ids))


def test_temporal_penalty_is_zero_for_straight_lines_only():
    line = torch.arange(6.0)[None, :, None] * torch.tensor([1.0, -2.0])
    mask = torch.ones(1, 6, dtype=torch.bool)
    assert temporal_penalty(line, mask) == 0
    assert temporal_penalty(line.square(), mask) == (2**2 + 8**2) / 2


def test_temporal_penalty_ignores_padding_even_where_it_is_nan():
    y = torch.randn(1, 7, 4, generator=torch.Generator().manual_seed(0))
    clean = temporal_penalty(y[:, 2:6], torch.ones(1, 4, dtype=torch.bool))
    y[:, :2], y[:, 6:] = float("nan"), float("inf")
    y.requires_grad_()
    padded = temporal_penalty(y, torch.tensor([[0, 0, 1, 1, 1, 1, 0]]))
    padded.backward()
    assert torch.equal(padded.detach(), clean)
    assert torch.equal(y.grad[:, :2], torch.zeros(1, 2, 4))
    assert y.grad[:, 2:6].abs().min() > 0


@pytest.mark.parametrize("ids", [[], [1], [1, 1], [1, 1, 2, 2], [0, 0, 0, 0]])
def test_temporal_penalty_without_a_triple_is_a_differentiable_zero(ids):
    y = torch.ones(1, len(ids), 8, dtype=torch.bfloat16, requires_grad=True)
    penalty = temporal_penalty(y, torch.tensor([ids], dtype=torch.int64))
    penalty.backward()
    assert penalty.item() == 0
    assert penalty.dtype == torch.float32
    assert torch.equal(y.grad, torch.zeros_like(y))


@pytest.mark.parametrize(
    ("progress", "weight"),
    [(0.0, 0.05), (0.29, 0.05), (0.3, 0.2), (0.69, 0.2), (0.7, 0.5), (1.0, 0.5)],
)
def test_default_phases(progress, weight):
    assert pet_weight(progress) == weight


@pytest.mark.parametrize("phases", [(), ((0.1, 1.0),), ((0.0, 1.0), (0.5, 1.0), (0.5, 2.0))])
def test_phases_must_start_at_zero_and_ascend(phases):
    with pytest.raises(ValueError, match="ascending"):
        pet_weight(0.5, phases)


@pytest.mark.parametrize("progress", [-0.1, 1.1, float("nan")])
def test_progress_is_a_fraction(progress):
    with pytest.raises(ValueError, match="between 0 and 1"):
        pet_weight(progress)


def test_inertia_is_the_mean_squared_angle_and_starts_at_zero():
    g = torch.zeros(2, 28, dtype=torch.float64)
    g[0, 0] = 0.3  # one plane of one of the two blocks
    g.requires_grad_()
    R = rotation_from_generators(g)
    start = inertia_penalty(R, R)
    (start_gradient,) = torch.autograd.grad(start, g, retain_graph=True)
    assert start == 0
    assert torch.equal(start_gradient, torch.zeros_like(g))
    turned = inertia_penalty(torch.eye(8, dtype=torch.float64).repeat(2, 1, 1), R)
    assert turned.item() == pytest.approx(2 * 0.3**2 / 2)


def test_inertia_pulls_back_to_the_reference():
    reference = rotation_from_generators(torch.full((3, 28), 0.2)).requires_grad_()
    g = torch.full((3, 28), 0.25, requires_grad=True)
    before = inertia_penalty(reference, rotation_from_generators(g))
    before.backward()
    after = inertia_penalty(reference, rotation_from_generators(g - 0.1 * g.grad))
    assert 0 < after < before
    assert reference.grad is None

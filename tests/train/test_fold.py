"""The fold is exact: rotating an output and rotating the weight are the same map."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t_train.fold import (
    LoraPair,
    calibrated_rows,
    composed_rotations,
    folded_rows,
    rotate_rows,
)
from so8t_train.rotation_gate import rotate_blocks
from so8t_train.so8_rotation import orthogonality_error, rotation_from_generators

SEEDS = st.integers(0, 2**31 - 1)


def _generators(
    seed: int, layers: int, blocks: int, std: float
) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    safe, command = torch.randn(2, layers, blocks, 28, generator=rng).mul(std)
    return safe, command


@settings(max_examples=30, deadline=None)
@given(seed=SEEDS, blocks=st.integers(1, 5), std=st.floats(0.001, 4.0))
def test_a_rotated_weight_acts_as_the_gate_after_the_layer(
    seed: int, blocks: int, std: float
) -> None:
    safe, command = _generators(seed, 1, blocks, std)
    rng = torch.Generator().manual_seed(seed + 1)
    weight = torch.randn(blocks * 8, 12, generator=rng, dtype=torch.float64)
    bias = torch.randn(blocks * 8, generator=rng, dtype=torch.float64)
    x = torch.randn(7, 12, generator=rng, dtype=torch.float64)
    rotation = composed_rotations(safe, command)[0]
    gated = rotate_blocks(rotation, x @ weight.T + bias)
    folded = x @ rotate_rows(rotation, weight).T + rotate_rows(rotation, bias)
    torch.testing.assert_close(folded, gated, rtol=1e-12, atol=1e-12)


@settings(max_examples=20, deadline=None)
@given(seed=SEEDS, std=st.floats(0.01, 3.0))
def test_the_hidden_state_meets_the_safety_rotation_first(seed: int, std: float) -> None:
    safe, command = _generators(seed, 2, 3, std)
    composed = composed_rotations(safe, command)
    for layer in range(2):
        R_safe = rotation_from_generators(safe[layer].double())
        R_cmd = rotation_from_generators(command[layer].double())
        torch.testing.assert_close(composed[layer], R_cmd @ R_safe, rtol=0, atol=1e-13)
        assert orthogonality_error(composed[layer]).max() < 1e-12
    swapped = composed_rotations(command, safe)
    assert (composed - swapped).abs().max() > 1e-6 * std**2


def test_rows_are_folded_alike_alone_and_in_the_whole_matrix() -> None:
    rng = torch.Generator().manual_seed(0)
    weight, bias = torch.randn(24, 16, generator=rng), torch.randn(24, generator=rng)
    lora = LoraPair(torch.randn(2, 16, generator=rng), torch.randn(24, 2, generator=rng))
    rotation = composed_rotations(*_generators(3, 1, 3, 0.7))[0]
    full = torch.block_diag(*rotation)
    merged = weight.double() + 2.0 * lora.b.double() @ lora.a.double()
    whole = folded_rows(weight, 0, lora, 2.0, rotation)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(whole, full @ merged)
    torch.testing.assert_close(folded_rows(bias, 0, None, 2.0, rotation), full @ bias.double())
    torch.testing.assert_close(folded_rows(weight, 0, lora, 2.0, None), merged)
    for start, stop in ((0, 8), (8, 24), (16, 24)):
        part = folded_rows(weight[start:stop], start, lora, 2.0, rotation)
        torch.testing.assert_close(part, whole[start:stop], rtol=1e-14, atol=1e-14)
        unrotated = folded_rows(weight[start:stop], start, lora, 2.0, None)
        torch.testing.assert_close(unrotated, merged[start:stop], rtol=1e-14, atol=1e-14)


@settings(max_examples=50, deadline=None)
@given(seed=SEEDS, temperature=st.floats(0.25, 10.0))
def test_calibrated_rows_give_the_probabilities_of_the_temperature(
    seed: int, temperature: float
) -> None:
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(3, 16, generator=rng, dtype=torch.float64)
    state = torch.randn(16, generator=rng, dtype=torch.float64) * 3
    folded = calibrated_rows(rows, temperature)
    expected = (rows @ state / temperature).softmax(dim=0)
    torch.testing.assert_close((folded @ state).softmax(dim=0), expected)
    torch.testing.assert_close(folded.mean(dim=0), rows.mean(dim=0))


def test_calibrated_rows_are_the_nearest_ones() -> None:
    rng = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 16, generator=rng, dtype=torch.float64)
    nearest = (calibrated_rows(rows, 2.0) - rows).norm()
    for _ in range(20):
        other = rows / 2.0 + torch.randn(16, generator=rng, dtype=torch.float64)
        assert (other - rows).norm() > nearest
    assert (rows / 2.0 - rows).norm() > nearest
    torch.testing.assert_close(calibrated_rows(rows, 1.0), rows)

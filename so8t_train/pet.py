"""PET regularisation: keeps gated outputs smooth over tokens and rotations steady over steps.

Pure functions; what they are applied to and with which global λ is the trainer's business.
"""

# Not `from __future__ import annotations`: jaxtyping reads the annotations when functions are made.
import itertools
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from so8t_train.so8_rotation import geodesic_distance_squared

PetPhase = tuple[float, float]
DEFAULT_PHASES: tuple[PetPhase, ...] = ((0.0, 0.05), (0.3, 0.2), (0.7, 0.5))


def temporal_penalty(
    y: Float[Tensor, "batch seq hidden"],
    mask: Bool[Tensor, "batch seq"] | Int[Tensor, "batch seq"],
) -> Float[Tensor, ""]:
    """Mean of (y[t+1] − 2 y[t] + y[t−1])² over features and token triples, float32 or better.

    ``mask`` is an attention mask, or the segment id of each token of a packed sequence: 0 (or
    False) is padding. A triple counts when its three tokens have the same id and none is padding,
    so segments never mix and a segment shorter than 3 tokens contributes nothing. 0 when no triple
    counts. Neighbouring segments must have different ids.

    Source: second-difference smoothness penalty, Whittaker, "On a New Method of Graduation" (Proc.
    Edinburgh Math. Soc. 41, 1923), here of order 2 along the token axis.
    """
    segment = mask.to(torch.int64)
    before, middle, after = segment[:, :-2], segment[:, 1:-1], segment[:, 2:]
    counts = (middle > 0) & (before == middle) & (middle == after)
    wide = y.to(torch.promote_types(y.dtype, torch.float32))
    second_difference = (wide[:, 2:] - 2 * wide[:, 1:-1] + wide[:, :-2])[counts]
    # Selecting, not multiplying by the mask: padding may hold NaN, and NaN · 0 is NaN.
    return second_difference.square().sum() / max(1, second_difference.numel())


def pet_weight(progress: float, phases: Sequence[PetPhase] = DEFAULT_PHASES) -> float:
    """Weight of the temporal term at ``progress`` (fraction of training done, 0 to 1).

    ``phases`` are (start, weight), in order; a phase holds from its start, inclusive, to the next.

    Raises:
        ValueError: ``progress`` is outside [0, 1], or the phases do not start at 0 and ascend.
    """
    starts = [start for start, _ in phases]
    if not starts or starts[0] != 0 or any(a >= b for a, b in itertools.pairwise(starts)):
        raise ValueError(
            f"expected PET phases starting at 0.0 and ascending, found starts {starts}"
        )
    if not 0 <= progress <= 1:
        raise ValueError(f"expected training progress between 0 and 1, found {progress}")
    return [weight for start, weight in phases if start <= progress][-1]


def inertia_penalty(
    R_prev: Float[Tensor, "blocks 8 8"], R: Float[Tensor, "blocks 8 8"]
) -> Float[Tensor, ""]:
    """Mean over blocks of ‖log(R_prevᵀ R)‖²_F, in rad², float64: exactly 0 before anything moves.

    ``R_prev`` is the reference (no gradient flows into it). For Source see
    ``geodesic_distance_squared``.
    """
    return geodesic_distance_squared(R_prev.detach(), R).mean()

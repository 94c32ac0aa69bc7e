"""The random generators that training draws from (dropout): the CPU's and every CUDA device's."""

from typing import NamedTuple

import torch
from torch import Tensor


class RandomState(NamedTuple):
    """Generator states, uint8 tensors; ``cuda`` by device index, empty without CUDA."""

    cpu: Tensor
    cuda: dict[str, Tensor]


def random_state() -> RandomState:
    """A copy of the present states; resting CUDA is not woken."""
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return RandomState(torch.get_rng_state(), {str(i): state for i, state in enumerate(cuda)})


def restore_random_state(state: RandomState) -> None:
    """Put states back; those of devices that this machine does not have are left out."""
    torch.set_rng_state(state.cpu)
    for index, tensor in state.cuda.items():
        if int(index) < torch.cuda.device_count():
            torch.cuda.set_rng_state(tensor, int(index))

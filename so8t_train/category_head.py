"""The category head: a linear layer that learns each case's category beside its verdict.

"Refuse" is thirteen different reasons, "escalate" eight. Telling them apart at the verdict position
teaches LoRA and R_safe more from a case than its verdict alone does. The head is used in training
only: it is in no run directory and no GGUF.

Source: Caruana 1997, Multitask Learning (related labels as an inductive bias for shared layers).
"""

# Not `from __future__ import annotations`: jaxtyping reads the annotations when functions are made.
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


class CategoryHead(nn.Module):
    """Scores hidden states (cases, hidden) for every category that the training cases have.

    Float32, zero at first: every category is equally likely, and no random number is drawn.
    """

    def __init__(self, hidden_size: int, categories: Sequence[str], device: torch.device) -> None:
        super().__init__()
        self._index = {name: i for i, name in enumerate(sorted(set(categories)))}
        self.weight = nn.Parameter(torch.zeros(len(self._index), hidden_size, device=device))
        self.bias = nn.Parameter(torch.zeros(len(self._index), device=device))

    def cross_entropy(
        self, states: Float[Tensor, "cases hidden"], categories: Sequence[str]
    ) -> Float[Tensor, " cases"]:
        """Nats of each case's own category, float32.

        Raises:
            KeyError: a category that no training case has.
        """
        scores = F.linear(states.float(), self.weight, self.bias)
        own = torch.tensor([self._index[name] for name in categories], device=scores.device)
        return F.cross_entropy(scores, own, reduction="none")

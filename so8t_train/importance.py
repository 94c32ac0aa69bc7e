"""Importance matrices: how much each input channel of a linear layer matters to its quantization."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from so8t_eval.errors import ExportError
from so8t_train.base_weights import OUTPUT
from so8t_train.gguf_layout import gguf_name
from so8t_train.packed_attention import UNUSED_MASK, use_packed_attention
from so8t_train.packing import PackedSequence, pack

VERDICT_SHARE: Final = 0.5
"""Weight of the verdict positions beside all tokens; llama-imatrix has none (0). See docs/export.md."""
_LEAST_SHARE: Final = 1e-6
"""Least importance of a channel over its layer's mean: llama.cpp finds no scale for zeros alone."""


class ImportanceMatrix(NamedTuple):
    """Weighted mean squares of inputs (input channels,), float32, by GGUF tensor name."""

    values: dict[str, npt.NDArray[np.float32]]
    prompts: int
    tokens: int


class ChannelSums:
    """Sums of squared inputs (input channels,) of every linear layer, float64, by module name.

    ``tokens`` are over all tokens, ``verdicts`` over the last token of each pass.
    """

    def __init__(self) -> None:
        self.tokens: dict[str, Tensor] = {}
        self.verdicts: dict[str, Tensor] = {}

    @contextmanager
    def watching(self, model: nn.Module) -> Iterator[None]:
        """Add the inputs of every linear layer but the output matrix while the model runs."""
        handles = [
            module.register_forward_pre_hook(self._adder(name))
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and f"{name}.weight" != OUTPUT
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _adder(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def add(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            squares = inputs[0].flatten(0, -2).double().square()
            for sums, found in ((self.tokens, squares.sum(dim=0)), (self.verdicts, squares[-1])):
                sums[name] = sums[name] + found if name in sums else found

        return add


def collect_importance(
    model: Any,
    prompts: Sequence[PackedSequence],
    architecture: str,
    verdict_share: float = VERDICT_SHARE,
) -> ImportanceMatrix:
    """Run every prompt whole and alone, and weigh each linear layer's input channels by it.

    An entry is ``(1 - s) E[x²] + s E_v[x²]``: ``E`` is the mean over all tokens, as llama-imatrix
    takes it, ``E_v`` over the verdict positions alone, ``s`` the ``verdict_share``. ``architecture``
    names the GGUF tensors. The output matrix has no entry: it is kept at Q8_0, which uses none.

    Raises:
        ExportError: an input is not finite, or a layer has no name in the architecture.
    """
    use_packed_attention(model)
    sums, tokens = ChannelSums(), 0
    with torch.no_grad(), sums.watching(model):
        for prompt in prompts:
            packed = pack([prompt], torch.device("cpu"))
            model.get_decoder()(
                input_ids=packed.ids,
                attention_mask=UNUSED_MASK,
                position_ids=packed.positions,
                use_cache=False,
                packed_layout=packed.layout,
            )
            tokens += packed.tokens
    values = {
        _tensor_name(module, architecture): _entry(
            module,
            (1 - verdict_share) * total / tokens
            + verdict_share * sums.verdicts[module] / len(prompts),
        )
        for module, total in sums.tokens.items()
    }
    return ImportanceMatrix(values, len(prompts), tokens)


def _tensor_name(module: str, architecture: str) -> str:
    name = gguf_name(f"{module}.weight", architecture)
    if name is None:
        raise ExportError(
            f"{module}: expected a linear layer that {architecture} has in GGUF, found none of that "
            "name; export with --no-imatrix"
        )
    return name


def _entry(module: str, means: Tensor) -> npt.NDArray[np.float32]:
    if not means.isfinite().all():
        raise ExportError(
            f"{module}: expected finite inputs, found others; export with --no-imatrix"
        )
    floored = means.clamp(min=_LEAST_SHARE * float(means.mean()))
    found: npt.NDArray[np.float32] = floored.float().numpy()
    return found

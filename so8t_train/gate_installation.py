"""Installs one rotation gate behind every attention output projection of a model; removes them.

The gate becomes a submodule of the attention module and acts through a forward hook on the output
projection, so no existing module is renamed or replaced: PEFT's file and module names stay as they
are, and LoRA, bias and 8-bit kernels run before the rotation.
"""

from collections.abc import Iterator
from typing import NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from so8t_eval.errors import ConfigError
from so8t_train.rotation_gate import GateRouting, RotationGate

LAYER_LIST_NAMES = ("layers", "h")
ATTENTION_NAMES = ("self_attn", "self_attention", "attention", "attn")
PROJECTION_NAMES = ("o_proj", "out_proj", "dense")
GATE_NAME = "rotation_gate"


class AttentionOutput(NamedTuple):
    """Where one decoder layer's attention output leaves its projection."""

    layer: int
    name: str  # of the projection in the unwrapped model: the weight there is f"{name}.weight"
    attention: nn.Module
    projection_name: str

    @property
    def projection(self) -> nn.Module:
        """The projection as it is now: a LoRA layer once PEFT has wrapped it."""
        return self.attention.get_submodule(self.projection_name)


class _CausalLM(Protocol):
    def get_decoder(self) -> nn.Module: ...


class _PeftModel(Protocol):
    def get_base_model(self) -> nn.Module: ...


class _SizedProjection(Protocol):
    out_features: int


class _HookAttachment:
    """Keeps a gate behind whatever module is the output projection at the time of the forward.

    PEFT replaces the projection by a LoRA layer, and replaces that again on merge or unload. A hook
    on the old module would then rotate too early, or not at all; so each forward of the attention
    module checks, and moves the hook. Bound methods, unlike closures, survive ``copy.deepcopy``.
    """

    def __init__(self, gate: RotationGate, output: AttentionOutput) -> None:
        self._gate = gate
        self._attention = output.attention
        self._projection_name = output.projection_name
        self._projection = output.projection
        self._rotating = self._projection.register_forward_hook(self._rotate)
        self._following = self._attention.register_forward_pre_hook(self._follow)
        self._attention.add_module(GATE_NAME, gate)

    def _rotate(
        self, _projection: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor
    ) -> Tensor:
        rotated: Tensor = self._gate(output)
        return rotated

    def _follow(self, attention: nn.Module, _inputs: tuple[Tensor, ...]) -> None:
        projection = attention.get_submodule(self._projection_name)
        if projection is not self._projection:
            self._rotating.remove()
            self._projection = projection
            self._rotating = projection.register_forward_hook(self._rotate)

    def detach(self) -> None:
        self._rotating.remove()
        self._following.remove()
        delattr(self._attention, GATE_NAME)


def install_rotation_gates(
    model: nn.Module, *, init_std: float = 0.0, seed: int = 0, routing: GateRouting | None = None
) -> list[RotationGate]:
    """Adds a gate to every decoder layer; returns them in layer order, sharing one ``routing``.

    ``model`` is a transformers causal LM, bare or wrapped by PEFT, in any dtype or 8-bit. Install
    after ``get_peft_model``: PEFT freezes every parameter it finds that is not its own. Each gate
    is on the device of its projection. ``init_std`` > 0 draws the generators from ``seed``.

    Raises:
        ConfigError: a layer has no attention output projection of a known name, the hidden size is
            not divisible by 8, or the model has gates already.
    """
    if rotation_gates(model):
        raise ConfigError(
            "the model has rotation gates already; remove_rotation_gates() them first"
        )
    shared = GateRouting() if routing is None else routing
    rng = torch.Generator().manual_seed(seed)
    outputs = attention_outputs(model)
    gates = [
        RotationGate(_out_features(output), init_std=init_std, rng=rng, routing=shared)
        for output in outputs
    ]
    for gate, output in zip(gates, outputs, strict=True):
        gate.to(_compute_device(output.projection)).train(model.training)
        gate.attachment = _HookAttachment(gate, output)
    return gates


def rotation_gates(model: nn.Module) -> list[RotationGate]:
    """The model's gates in layer order; empty if none are installed."""
    return [module for module in model.modules() if isinstance(module, RotationGate)]


def remove_rotation_gates(model: nn.Module) -> None:
    """Takes all gates out again, leaving the model as it was before ``install_rotation_gates``."""
    for gate in rotation_gates(model):
        if gate.attachment is not None:
            gate.attachment.detach()
            gate.attachment = None


def attention_outputs(model: nn.Module) -> list[AttentionOutput]:
    """The attention output projection of every decoder layer of a causal LM, in layer order.

    Raises:
        ConfigError: the decoder layers or, in one of them, the projection cannot be found.
    """
    base = cast(_PeftModel, model).get_base_model() if hasattr(model, "get_base_model") else model
    if not hasattr(base, "get_decoder"):
        raise ConfigError(
            f"expected a transformers causal language model, found {type(base).__name__}, which "
            "has no get_decoder(); choose another base_model"
        )
    decoder = cast(_CausalLM, base).get_decoder()
    name_of = {module: name for name, module in base.named_modules()}
    return [
        _attention_output(index, layer, name_of) for index, layer in enumerate(_layers(decoder))
    ]


def _layers(decoder: nn.Module) -> Iterator[nn.Module]:
    children = dict(decoder.named_children())
    for name in LAYER_LIST_NAMES:
        layers = children.get(name)
        if isinstance(layers, nn.ModuleList) and len(layers):
            return iter(layers)
    raise ConfigError(
        f"expected decoder layers under one of {', '.join(LAYER_LIST_NAMES)}, found in "
        f"{type(decoder).__name__}: {', '.join(children) or 'nothing'}; choose another base_model"
    )


def _attention_output(
    index: int, layer: nn.Module, name_of: dict[nn.Module, str]
) -> AttentionOutput:
    attentions = [child for name, child in layer.named_children() if name in ATTENTION_NAMES]
    for attention in attentions:
        children = dict(attention.named_children())
        for projection_name in PROJECTION_NAMES:
            if projection_name in children:
                name = f"{name_of[attention]}.{projection_name}"
                return AttentionOutput(index, name, attention, projection_name)
    found = [name for module in attentions or [layer] for name, _ in module.named_children()]
    raise ConfigError(
        f"expected an attention output projection ({', '.join(PROJECTION_NAMES)}) under one of "
        f"{', '.join(ATTENTION_NAMES)}, found in {name_of[layer]} ({type(layer).__name__}): "
        f"{', '.join(found) or 'nothing'}; this architecture is not supported, choose another "
        "base_model"
    )


def _out_features(output: AttentionOutput) -> int:
    if not hasattr(output.projection, "out_features"):
        raise ConfigError(
            f"expected a linear layer at {output.name}, found {type(output.projection).__name__}; "
            "choose another base_model"
        )
    return cast(_SizedProjection, output.projection).out_features


def _compute_device(projection: nn.Module) -> torch.device:
    device = next(projection.parameters()).device
    # Offloaded by accelerate: the weight comes to the device of its input only for the forward,
    # and so will the small rotation.
    return torch.device("cpu") if device.type == "meta" else device

"""The rotation gate as a module, the routing of its two losses, and the bank that serves a step.

A gate turns the hidden state by G = R_cmd · R_safe, block by block. R_safe must learn from the
safety loss alone and R_cmd from the task loss alone. Two ways give exactly zero cross gradients:
``GateRouting`` (one forward per loss) and ``RotationGateBank`` (any number of forwards per
optimizer step, exponentials computed once).
"""

# Not `from __future__ import annotations`: jaxtyping reads the annotations when functions are made.
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor, nn

from so8t_eval.errors import ConfigError
from so8t_train.so8_rotation import (
    BLOCK_SIZE,
    GENERATOR_SIZE,
    compose,
    rotation_from_generators,
)

Route: TypeAlias = Literal["safety", "task", "both", "none"]
LossKind: TypeAlias = Literal["safety", "task"]


@dataclass
class GateRouting:
    """Which loss the next forward is for; all gates of a model share one instance.

    "safety" lets gradients into R_safe only, "task" into R_cmd only, "both" and "none" say
    themselves. Read at forward time, so under gradient checkpointing it must keep its value until
    the backward pass has recomputed the forward. Held rotations (``RotationGateBank``) ignore it.
    """

    route: Route = "both"


class RotationPair(NamedTuple):
    """Both rotations of the same blocks, in the order a hidden state meets them."""

    safe: Float[Tensor, "blocks 8 8"]
    command: Float[Tensor, "blocks 8 8"]


def rotations_of(
    safe: Float[Tensor, "gates blocks 28"], command: Float[Tensor, "gates blocks 28"]
) -> RotationPair:
    """Both rotations of all gates, stacked in gate order, from their generators; no gradient."""
    with torch.no_grad():
        return RotationPair(
            rotation_from_generators(safe.flatten(0, 1)),
            rotation_from_generators(command.flatten(0, 1)),
        )


class GateAttachment(Protocol):
    """What ties a gate to a model; kept on the gate so that it can be undone."""

    def detach(self) -> None:
        """Remove the gate from the model."""


class RotationGate(nn.Module):
    """Rotates a hidden state of ``hidden_size`` features in blocks of eight by R_cmd · R_safe.

    Parameters ``safe_generators`` and ``command_generators``: (hidden_size / 8, 28), float32, zero
    (no rotation) unless ``init_std`` > 0. They stay float32 when the model is cast to a half dtype.

    Raises:
        ConfigError: ``hidden_size`` is not divisible by 8.
        ValueError: ``init_std`` > 0 without an ``rng`` to draw from.
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        init_std: float = 0.0,
        rng: torch.Generator | None = None,
        routing: GateRouting | None = None,
    ) -> None:
        super().__init__()
        if hidden_size <= 0 or hidden_size % BLOCK_SIZE:
            raise ConfigError(
                f"expected a base model whose hidden size is divisible by {BLOCK_SIZE}, found "
                f"{hidden_size}: a rotation gate cannot be added; choose another base_model"
            )
        if init_std > 0 and rng is None:
            raise ValueError("init_std > 0 needs an rng (torch.Generator) to draw from")
        self.hidden_size = hidden_size
        self.blocks = hidden_size // BLOCK_SIZE
        self.routing = GateRouting() if routing is None else routing
        self.attachment: GateAttachment | None = None
        self._held: Tensor | None = None
        self.safe_generators = self._drawn(init_std, rng)
        self.command_generators = self._drawn(init_std, rng)

    def _drawn(self, std: float, rng: torch.Generator | None) -> nn.Parameter:
        shape = (self.blocks, GENERATOR_SIZE)
        if std <= 0:
            return nn.Parameter(torch.zeros(shape, dtype=torch.float32))
        return nn.Parameter(std * torch.randn(shape, generator=rng, dtype=torch.float32))

    def safe_rotation(self) -> Float[Tensor, "blocks 8 8"]:
        """R_safe, float32, differentiable in the safe generators."""
        return rotation_from_generators(self.safe_generators)

    def command_rotation(self) -> Float[Tensor, "blocks 8 8"]:
        """R_cmd, float32, differentiable in the command generators."""
        return rotation_from_generators(self.command_generators)

    def rotation(self) -> Float[Tensor, "blocks 8 8"]:
        """G = R_cmd · R_safe, float32, differentiable in both whatever the route."""
        return compose(self.command_rotation(), self.safe_rotation())

    def forward(self, x: Float[Tensor, "*tokens hidden"]) -> Float[Tensor, "*tokens hidden"]:
        """``x`` rotated, in its own dtype; computed in float32 (float64 for float64 input).

        An optimized float32 product on CUDA may use TF32 where the caller has enabled that.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(device_type=x.device.type, enabled=False):
            rotation = self._routed_rotation(dtype) if self._held is None else self._held
            return rotate_blocks(rotation.to(device=x.device, dtype=dtype), x)

    def hold(self, rotation: Float[Tensor, "blocks 8 8"] | None) -> None:
        """Use this G in every forward until told otherwise; None goes back to the generators."""
        self._held = rotation

    def held_rotation(self) -> Float[Tensor, "blocks 8 8"] | None:
        """The G set by ``hold``, None when forwards compute their own."""
        return self._held

    def _routed_rotation(self, dtype: torch.dtype) -> Tensor:
        safe, command, route = self.safe_generators, self.command_generators, self.routing.route
        learns_safe, learns_command = route in ("safety", "both"), route in ("task", "both")
        R_safe = rotation_from_generators((safe if learns_safe else safe.detach()).to(dtype))
        R_cmd = rotation_from_generators(
            (command if learns_command else command.detach()).to(dtype)
        )
        return compose(R_cmd, R_safe)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RotationGate":
        def keeping_precision(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            narrowed = torch.promote_types(result.dtype, torch.float32) != result.dtype
            return tensor.to(result.device) if narrowed else result

        self._held = None  # made from the generators as they were, on the device they were on
        super()._apply(keeping_precision, recurse)  # type: ignore[no-untyped-call]
        return self


def rotate_blocks(
    rotation: Float[Tensor, "blocks 8 8"], x: Float[Tensor, "*tokens hidden"]
) -> Float[Tensor, "*tokens hidden"]:
    """y[..., b, i] = Σ_j G[b, i, j] x[..., b, j], computed in G's dtype, returned in ``x``'s."""
    blocks = x.to(rotation.dtype).reshape(-1, rotation.shape[0], BLOCK_SIZE)
    rotated = torch.bmm(blocks.transpose(0, 1), rotation.mT)
    return rotated.transpose(0, 1).reshape(x.shape).to(x.dtype)


@contextmanager
def captured_outputs(gates: Sequence[RotationGate]) -> Iterator[list[Tensor]]:
    """Collects the gated outputs of the forwards run inside, in the order they are computed.

    The tensors carry their graph, for the temporal penalty. Leave the context before ``backward``:
    gradient checkpointing runs forwards again there, which must not be collected twice.
    """
    outputs: list[Tensor] = []

    def collect(_gate: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
        outputs.append(output)

    handles = [gate.register_forward_hook(collect) for gate in gates]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


@dataclass
class _Step:
    """One optimizer step: the graph from generators to rotations, and the gradients so far."""

    rotations: RotationPair
    leaves: list[Tensor]
    gradients: dict[LossKind, Tensor] = field(default_factory=dict)


class RotationGateBank:
    """Computes the rotations of all gates once per optimizer step and routes their gradients.

    Usage::

        bank.begin_step()
        for batch in micro_batches:
            safety_loss.backward(retain_graph=True); bank.collect("safety")
            task_loss.backward();                    bank.collect("task")
        bank.finish_step(inertia)      # generators' .grad is now set; then optimizer.step()

    During a step each gate's forward uses its G as a leaf tensor, so several micro-batches, several
    backward passes and gradient checkpointing all meet the same tensor. ``collect`` says which loss
    the gradient since the last ``collect`` came from. ``finish_step`` sends the safety loss's dL/dG
    through R_cmd · R_safe with R_cmd constant, the task loss's with R_safe constant: exactly the
    gradients of two separate passes, and exactly zero across. The gates' ``route`` is ignored.
    """

    def __init__(self, gates: Sequence[RotationGate]) -> None:
        if not gates:
            raise ValueError("expected at least one rotation gate, found none")
        self._gates = list(gates)
        self._sizes = [gate.blocks for gate in gates]
        self._step: _Step | None = None

    def begin_step(self) -> None:
        """Compute all rotations from the generators as they are; forwards use them until the end.

        Raises:
            RuntimeError: the step before was neither finished nor ended.
        """
        if self._step is not None:
            raise RuntimeError("a step is open: call finish_step(), or end() to drop it")
        with torch.enable_grad():
            rotations = self._rotations()
        leaves = self._hold(compose(rotations.command, rotations.safe).detach())
        for leaf in leaves:
            leaf.requires_grad_()
        self._step = _Step(rotations, leaves)

    def rotations(self) -> RotationPair:
        """R_safe and R_cmd of all gates, stacked in gate order, with this step's graph.

        For penalties on the rotations themselves: give their sum to ``finish_step``.
        """
        return self._open_step().rotations

    def collect(self, loss_kind: LossKind) -> None:
        """Book the gradients that arrived since the last ``collect`` under this loss."""
        step = self._open_step()
        if all(leaf.grad is None for leaf in step.leaves):
            return
        device = step.rotations.safe.device
        arrived = torch.cat(
            [
                (torch.zeros_like(leaf) if leaf.grad is None else leaf.grad).to(device)
                for leaf in step.leaves
            ]
        )
        for leaf in step.leaves:
            leaf.grad = None
        booked = step.gradients.get(loss_kind)
        step.gradients[loss_kind] = arrived if booked is None else booked + arrived

    def finish_step(self, penalty: Float[Tensor, ""] | None = None) -> None:
        """Add the step's gradients to the generators' ``.grad`` and let go of the rotations.

        ``penalty`` is a scalar of ``rotations()`` (or of the generators), backpropagated in the
        same pass. Generators that do not require a gradient, or got none, are left alone.

        Raises:
            RuntimeError: no step is open, or gradients arrived that no ``collect`` named.
        """
        step = self._open_step()
        if any(leaf.grad is not None for leaf in step.leaves):
            raise RuntimeError(
                "gradients arrived after the last collect(): say which loss they are of"
            )
        roots: list[Tensor] = []
        gradients: list[Tensor | None] = []
        safe, command = step.rotations
        for kind, gradient in step.gradients.items():
            root = (
                compose(command.detach(), safe)
                if kind == "safety"
                else compose(command, safe.detach())
            )
            roots.append(root)
            gradients.append(gradient)
        if penalty is not None:
            roots.append(penalty)
            gradients.append(None)
        reachable = [i for i, root in enumerate(roots) if root.requires_grad]
        if reachable:
            torch.autograd.backward(
                [roots[i] for i in reachable], [gradients[i] for i in reachable]
            )
        self.end()

    def begin_eval(self) -> None:
        """Compute all rotations once, without gradients; forwards use them until ``end``.

        Raises:
            RuntimeError: a step is open.
        """
        if self._step is not None:
            raise RuntimeError("a step is open: call finish_step(), or end() to drop it")
        with torch.no_grad():
            rotations = self._rotations()
            self._hold(compose(rotations.command, rotations.safe))

    def end(self) -> None:
        """Back to rotations computed in each forward; drops an open step and its gradients."""
        self._step = None
        for gate in self._gates:
            gate.hold(None)

    def _open_step(self) -> _Step:
        if self._step is None:
            raise RuntimeError("no step is open: call begin_step() first")
        return self._step

    def _rotations(self) -> RotationPair:
        device = self._gates[0].safe_generators.device
        safe = torch.cat([gate.safe_generators.to(device) for gate in self._gates])
        command = torch.cat([gate.command_generators.to(device) for gate in self._gates])
        return RotationPair(rotation_from_generators(safe), rotation_from_generators(command))

    def _hold(self, stacked: Tensor) -> list[Tensor]:
        parts = torch.split(stacked, self._sizes)
        held = [
            part.to(gate.safe_generators.device).clone()
            for part, gate in zip(parts, self._gates, strict=True)
        ]
        for gate, rotation in zip(self._gates, held, strict=True):
            gate.hold(rotation)
        return held

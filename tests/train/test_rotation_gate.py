"""The rotation gate: what it computes in each dtype, and where gradients may and may not go."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from so8t_eval.errors import ConfigError
from so8t_train.pet import inertia_penalty, temporal_penalty
from so8t_train.rotation_gate import (
    GateRouting,
    RotationGate,
    RotationGateBank,
    captured_outputs,
)
from so8t_train.so8_rotation import orthogonality_error

HIDDEN = 64


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_gate(std: float = 0.3, seed: int = 0, routing: GateRouting | None = None) -> RotationGate:
    return RotationGate(HIDDEN, init_std=std, rng=seeded(seed), routing=routing)


def hidden_states(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, HIDDEN, generator=seeded(9), dtype=torch.float64).to(dtype)


class GatedStack(nn.Module):
    """Linear maps and gates in turn, attention-like in that tokens mix."""

    def __init__(self, routing: GateRouting, *, checkpointed: bool = False) -> None:
        super().__init__()
        self.gates = nn.ModuleList([new_gate(0.2, seed, routing) for seed in range(3)])
        self.maps = nn.ModuleList([nn.Linear(HIDDEN, HIDDEN) for _ in range(3)])
        for seed, linear in enumerate(self.maps):
            nn.init.normal_(linear.weight, std=0.1, generator=seeded(50 + seed))
            nn.init.zeros_(linear.bias)
        self.checkpointed = checkpointed

    def layer(self, index: int, x: torch.Tensor) -> torch.Tensor:
        mixed = x + x.cumsum(-2).tanh()
        return x + self.gates[index](self.maps[index](mixed))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for index in range(3):
            if self.checkpointed:
                x = checkpoint(self.layer, index, x, use_reentrant=False)
            else:
                x = self.layer(index, x)
        return x


def safety_loss(y: torch.Tensor) -> torch.Tensor:
    return y[..., -1, :8].square().mean()


def task_loss(y: torch.Tensor) -> torch.Tensor:
    return y[..., :-1, 8:].cos().mean()


def batches() -> list[torch.Tensor]:
    return [hidden_states(2, 5), hidden_states(1, 7)]


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def routed_gradients() -> dict[str, torch.Tensor]:
    """Plain autograd, one forward per loss: the reference for the bank."""
    routing = GateRouting()
    model = GatedStack(routing)
    for x in batches():
        routing.route = "safety"
        safety_loss(model(x)).backward()
        routing.route = "task"
        task_loss(model(x)).backward()
    return gradients(model)


def test_starts_as_the_identity_in_float32():
    gate = RotationGate(HIDDEN)
    x = hidden_states(2, 3)
    assert gate.safe_generators.shape == gate.command_generators.shape == (8, 28)
    assert {p.dtype for p in gate.parameters()} == {torch.float32}
    assert sorted(gate.state_dict()) == ["command_generators", "safe_generators"]
    assert torch.equal(gate(x), x)


@pytest.mark.parametrize("size", [0, 4, 60, 577])
def test_hidden_size_must_divide_by_eight(size):
    with pytest.raises(ConfigError, match=f"divisible by 8, found {size}"):
        RotationGate(size)


def test_random_start_is_reproducible_and_needs_an_rng():
    first, again, other = new_gate(seed=1), new_gate(seed=1), new_gate(seed=2)
    assert torch.equal(first.safe_generators, again.safe_generators)
    assert not torch.equal(first.safe_generators, other.safe_generators)
    assert not torch.equal(first.safe_generators, first.command_generators)
    assert first.safe_generators.std().item() == pytest.approx(0.3, rel=0.2)
    with pytest.raises(ValueError, match="needs an rng"):
        RotationGate(HIDDEN, init_std=0.1)


def test_forward_is_command_after_safe_block_by_block():
    gate, x = new_gate(), hidden_states(2, 3)
    R_safe, R_cmd = gate.safe_rotation(), gate.command_rotation()
    expected, swapped = torch.empty_like(x), torch.empty_like(x)
    for batch, token, block in itertools.product(range(2), range(3), range(8)):
        part = slice(8 * block, 8 * block + 8)
        v = x[batch, token, part]
        expected[batch, token, part] = R_cmd[block] @ (R_safe[block] @ v)
        swapped[batch, token, part] = R_safe[block] @ (R_cmd[block] @ v)
    y = gate(x)
    torch.testing.assert_close(y, expected)
    assert (y - swapped).abs().max() > 0.1


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(), (1,), (2, 3), (2, 3, 4)])
def test_computes_wide_and_casts_last(dtype, shape):
    gate, x = new_gate(3.0), hidden_states(*shape, dtype=dtype)
    y = gate(x)
    G = torch.block_diag(*copy.deepcopy(gate).double().rotation())
    exact = x.double() @ G.T
    assert y.dtype == dtype
    assert y.shape == x.shape
    bound = {torch.float64: 1e-13, torch.float32: 2e-6}.get(dtype, torch.finfo(dtype).eps * 4)
    torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps, atol=bound)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_casting_the_model_keeps_the_generators_float32(dtype):
    gate = new_gate()
    before = copy.deepcopy(gate.state_dict())
    gate.to(dtype)
    assert all(torch.equal(before[name], value) for name, value in gate.state_dict().items())
    assert orthogonality_error(gate.rotation()).max() < 1e-6
    assert gate.double().safe_generators.dtype == torch.float64


def test_autocast_does_not_reach_the_rotation():
    gate, x = new_gate(), hidden_states(2, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = gate(x)
    assert torch.equal(y, gate(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("bias", [True, False])
def test_gated_projection_equals_folded_weights(dtype, bias):
    gate = new_gate(3.0)
    linear = nn.Linear(32, HIDDEN, bias=bias, dtype=dtype)
    x = torch.randn(5, 32, generator=seeded(3), dtype=dtype)
    gated = gate(linear(x))
    G = torch.block_diag(*copy.deepcopy(gate).double().rotation())
    folded = x.double() @ (G @ linear.weight.double()).T
    if bias:
        folded = folded + G @ linear.bias.double()
    bound = 1e-12 if dtype == torch.float64 else 3e-6
    torch.testing.assert_close(gated.double(), folded, rtol=0, atol=bound)


@pytest.mark.parametrize(
    ("route", "learning"),
    [
        ("safety", {"safe_generators"}),
        ("task", {"command_generators"}),
        ("both", {"safe_generators", "command_generators"}),
        ("none", set()),
    ],
)
def test_route_lets_only_its_rotation_learn(route, learning):
    gate = new_gate(routing=GateRouting(route))
    x = hidden_states(2, 3).requires_grad_()
    gate(x).square()[..., 0].sum().backward()
    assert set(gradients(gate)) == learning
    assert x.grad.abs().max() > 0


def test_bank_gradients_equal_one_forward_per_loss():
    expected = routed_gradients()
    model = GatedStack(GateRouting())
    bank = RotationGateBank(list(model.gates))
    bank.begin_step()
    for x in batches():
        y = model(x)
        safety_loss(y).backward(retain_graph=True)
        bank.collect("safety")
        task_loss(y).backward()
        bank.collect("task")
    bank.finish_step()
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-7)
        assert gradient.abs().max() > 1e-5


def test_bank_under_gradient_checkpointing_gives_the_same_gradients():
    expected = routed_gradients()
    model = GatedStack(GateRouting(), checkpointed=True)
    bank = RotationGateBank(list(model.gates))
    bank.begin_step()
    for x in batches():
        y = model(x)
        safety_loss(y).backward(retain_graph=True)
        bank.collect("safety")
        task_loss(y).backward()
        bank.collect("task")
    bank.finish_step()
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(
    ("kind", "learning"), [("safety", "safe_generators"), ("task", "command_generators")]
)
def test_bank_leaves_the_other_rotation_without_any_gradient(kind, learning):
    model = GatedStack(GateRouting())
    bank = RotationGateBank(list(model.gates))
    bank.begin_step()
    model(hidden_states(2, 5)).square()[..., 0].mean().backward()
    bank.collect(kind)
    bank.finish_step()
    assert set(gradients(model.gates)) == {f"{i}.{learning}" for i in range(3)}


def test_rotations_part_only_because_the_losses_are_routed():
    model = GatedStack(GateRouting())
    for gate in model.gates:
        nn.init.zeros_(gate.safe_generators)
        nn.init.zeros_(gate.command_generators)
    bank = RotationGateBank(list(model.gates))
    bank.begin_step()
    y = model(hidden_states(2, 5))
    safety_loss(y).backward(retain_graph=True)
    bank.collect("safety")
    task_loss(y).backward()
    bank.collect("task")
    bank.finish_step()
    for gate in model.gates:
        assert not torch.allclose(gate.safe_generators.grad, gate.command_generators.grad)


def test_bank_respects_frozen_generators():
    model = GatedStack(GateRouting())
    for gate in model.gates:
        gate.safe_generators.requires_grad_(False)
    bank = RotationGateBank(list(model.gates))
    bank.begin_step()
    y = model(hidden_states(2, 5))
    safety_loss(y).backward(retain_graph=True)
    bank.collect("safety")
    task_loss(y).backward()
    bank.collect("task")
    bank.finish_step()
    assert set(gradients(model.gates)) == {f"{i}.command_generators" for i in range(3)}


def test_bank_adds_a_penalty_on_the_rotations():
    model, twin = GatedStack(GateRouting()), GatedStack(GateRouting())
    reference = torch.eye(8).repeat(24, 1, 1)
    bank = RotationGateBank(list(model.gates))
    bank.begin_step()
    safe, command = bank.rotations()
    bank.finish_step(inertia_penalty(reference, safe) + 2 * inertia_penalty(reference, command))
    stacked_safe = torch.cat([gate.safe_rotation() for gate in twin.gates])
    stacked_command = torch.cat([gate.command_rotation() for gate in twin.gates])
    penalty = inertia_penalty(reference, stacked_safe)
    (penalty + 2 * inertia_penalty(reference, stacked_command)).backward()
    expected = gradients(twin.gates)
    for name, gradient in gradients(model.gates).items():
        torch.testing.assert_close(gradient, expected[name])


def test_bank_step_without_any_gradient_leaves_grad_unset():
    model = GatedStack(GateRouting())
    bank = RotationGateBank(list(model.gates))
    bank.begin_step()
    bank.collect("safety")
    bank.finish_step()
    assert gradients(model) == {}


def test_bank_rotations_follow_the_optimizer():
    model = GatedStack(GateRouting())
    gates, x = list(model.gates), hidden_states(2, 5)
    bank = RotationGateBank(gates)
    optimizer = torch.optim.SGD(model.gates.parameters(), lr=1e-3)
    outputs = []
    for _ in range(2):
        optimizer.zero_grad()
        bank.begin_step()
        y = model(x)
        twin = GatedStack(GateRouting())
        twin.load_state_dict(model.state_dict())
        torch.testing.assert_close(y, twin(x))
        safety_loss(y).backward()
        bank.collect("safety")
        bank.finish_step()
        optimizer.step()
        outputs.append(y.detach())
    assert not torch.equal(outputs[0], outputs[1])
    assert safety_loss(outputs[1]) < safety_loss(outputs[0])


def test_bank_in_evaluation_caches_without_gradients():
    model, x = GatedStack(GateRouting()), hidden_states(2, 5)
    expected = model(x).detach()
    bank = RotationGateBank(list(model.gates))
    bank.begin_eval()
    assert all(not gate.held_rotation().requires_grad for gate in model.gates)
    torch.testing.assert_close(model(x).detach(), expected)
    with torch.no_grad():
        model.gates[0].safe_generators.add_(1.0)
    torch.testing.assert_close(model(x).detach(), expected)
    bank.end()
    assert not torch.allclose(model(x), expected)


def test_bank_refuses_to_lose_gradients():
    model = GatedStack(GateRouting())
    bank = RotationGateBank(list(model.gates))
    with pytest.raises(RuntimeError, match="call begin_step"):
        bank.collect("task")
    bank.begin_step()
    with pytest.raises(RuntimeError, match="a step is open"):
        bank.begin_step()
    with pytest.raises(RuntimeError, match="a step is open"):
        bank.begin_eval()
    safety_loss(model(hidden_states(1, 3))).backward()
    with pytest.raises(RuntimeError, match="after the last collect"):
        bank.finish_step()
    bank.end()
    bank.begin_step()
    bank.finish_step()
    with pytest.raises(ValueError, match="at least one"):
        RotationGateBank([])


def test_captured_outputs_serve_the_temporal_penalty_under_checkpointing():
    plain, checkpointed = (GatedStack(GateRouting(), checkpointed=c) for c in (False, True))
    mask = torch.ones(2, 5, dtype=torch.bool)
    found = []
    for model in (plain, checkpointed):
        with captured_outputs(list(model.gates)) as outputs:
            y = model(hidden_states(2, 5))
        assert len(outputs) == 3
        (safety_loss(y) + sum(temporal_penalty(output, mask) for output in outputs)).backward()
        assert len(outputs) == 3
        found.append(gradients(model))
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient)

"""The training loop: who learns from which loss, schedule, failure, determinism."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_fit import build_trainer, fit_config, ignore_step
from torch import Tensor

from so8t_eval.errors import BackendError, Interrupted
from so8t_train.checkpoint import checkpoint_directories, load_checkpoint
from so8t_train.step_passes import learns_reply
from so8t_train.trainer import (
    CHECKPOINTS,
    StepReport,
    Trainer,
    TrainingHooks,
)
from so8t_train.training_plan import schedule, total_steps, training_hash

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

SAFETY_ONLY = {"task_loss_weight": 0.0, "pet_weight": 0.0, "pet_inertia_weight": 0.0}
TASK_ONLY = {"safety_loss_weight": 0.0, "pet_weight": 0.0, "pet_inertia_weight": 0.0}
BOTH = {"pet_weight": 0.0, "pet_inertia_weight": 0.0}
# Rotations that differ from the identity, so that a wrong route could not hide behind zeros.
TURNED = {"rotation_init_std": 0.2, "seed": 5}

Make = Callable[..., Trainer]


@pytest.fixture
def make(tiny_llama: Path, tmp_path: Path) -> Make:
    def trainer(name: str = "fit", **changes: object) -> Trainer:
        return build_trainer(fit_config(tmp_path / name, tiny_llama, **changes))

    return trainer


def run(trainer: Trainer, on_step: Callable[[StepReport], None] = ignore_step) -> Trainer:
    trainer.run(TrainingHooks(on_step, lambda: False))
    return trainer


def stop_after(trainer: Trainer, step: int) -> None:
    with pytest.raises(Interrupted, match=f"stopped after step {step} of"):
        trainer.run(TrainingHooks(ignore_step, lambda: trainer.step >= step))


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters()}


def gradients_of_first_step(trainer: Trainer) -> dict[str, Tensor | None]:
    """Gradients as the optimizer met them; the step is taken too."""
    seen: dict[str, Tensor | None] = {}

    def look(*_: object) -> None:
        for parameter, name in trainer.names.items():
            seen[name] = None if parameter.grad is None else parameter.grad.clone()

    with trainer.optimizer.register_step_pre_hook(look):
        stop_after(trainer, 1)
    return seen


def of_kind(tensors: dict[str, Tensor | None], kind: str) -> list[Tensor | None]:
    found = [tensor for name, tensor in tensors.items() if kind in name]
    assert found
    return found


def is_zero(gradient: Tensor | None) -> bool:
    return gradient is None or not bool(gradient.any())


# -- routing --------------------------------------------------------------------------------


def test_safety_loss_alone_gives_command_generators_exactly_zero_gradient(make: Make) -> None:
    gradients = gradients_of_first_step(make(**SAFETY_ONLY, **TURNED))
    assert all(is_zero(g) for g in of_kind(gradients, "command_generators"))
    assert not any(is_zero(g) for g in of_kind(gradients, "safe_generators"))
    assert not any(is_zero(g) for g in of_kind(gradients, "verdict_rows"))
    assert not all(is_zero(g) for g in of_kind(gradients, "lora_B"))


def test_task_loss_alone_gives_safe_generators_and_rows_exactly_zero_gradient(make: Make) -> None:
    gradients = gradients_of_first_step(make(**TASK_ONLY, **TURNED))
    assert all(is_zero(g) for g in of_kind(gradients, "safe_generators"))
    assert all(is_zero(g) for g in of_kind(gradients, "verdict_rows"))
    assert not any(is_zero(g) for g in of_kind(gradients, "command_generators"))
    assert not all(is_zero(g) for g in of_kind(gradients, "lora_B"))


def test_with_both_losses_each_rotation_has_the_gradient_of_its_own(make: Make) -> None:
    both, safety, task = (
        # No clipping, or the groups of the three runs would be scaled differently.
        gradients_of_first_step(make(name, **losses, **TURNED, max_grad_norm=1e9))
        for name, losses in (("both", BOTH), ("safety", SAFETY_ONLY), ("task", TASK_ONLY))
    )
    for name, found in both.items():
        assert found is not None, name
        if "safe_generators" in name or "verdict_rows" in name:
            expected = safety[name]
        elif "command_generators" in name:
            expected = task[name]
        else:
            expected = torch.zeros(1) + sum(g for g in (safety[name], task[name]) if g is not None)
        assert expected is not None, name
        torch.testing.assert_close(found, expected.expand_as(found), rtol=1e-3, atol=1e-6)


def test_the_base_never_changes(make: Make) -> None:
    trainer = make(max_steps=2)
    before = weights(trainer)
    run(trainer)
    after = weights(trainer)
    learned = set(trainer.names.values())
    assert all(torch.equal(before[n], after[n]) for n in before if n not in learned)
    assert all(any(kind in n for n in learned) for kind in ("lora_A", "safe_", "command_"))


def test_freeze_safe_keeps_safety_bit_identical_and_learns_the_rest(make: Make) -> None:
    trainer = make(freeze="safe", **TURNED)
    before = weights(trainer)
    run(trainer)
    after = weights(trainer)
    kept = [n for n in before if "safe_generators" in n or "verdict_" in n]
    assert len(kept) == 2 + 1
    assert all(torch.equal(before[n], after[n]) for n in kept)
    moved = [n for n in before if "command_generators" in n or "lora_" in n]
    assert not any(torch.equal(before[n], after[n]) for n in moved)


def test_commutator_grows_from_zero_when_both_losses_train(make: Make) -> None:
    reports: list[StepReport] = []
    run(make(), reports.append)
    assert reports[0].commutator == 0
    assert reports[-1].commutator > 1e-6


def test_commutator_stays_zero_without_the_task_loss(make: Make) -> None:
    reports: list[StepReport] = []
    run(make(**SAFETY_ONLY), reports.append)
    assert [report.commutator for report in reports] == [0.0] * 4
    assert all(report.task_loss is None for report in reports)


def test_inertia_is_measured_from_the_last_checkpoint(make: Make) -> None:
    reports: list[StepReport] = []
    run(make(save_every_steps=2, max_steps=4), reports.append)
    # Each value is taken before its step's update: 0 at the reference itself.
    assert [report.pet_inertia > 0 for report in reports] == [False, True, False, True]


# -- equivalent ways to compute a step -------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"gradient_checkpointing": True},
        {"micro_batch_size": 1, "gradient_accumulation_steps": 3, "pet_weight": 0.0},
    ],
)
def test_gradient_does_not_depend_on_how_the_step_is_computed(
    change: dict[str, object], make: Make
) -> None:
    common = {k: v for k, v in change.items() if k == "pet_weight"} | TURNED
    expected = gradients_of_first_step(make("one", **common))
    found = gradients_of_first_step(make("other", **{**common, **change}))
    for name, gradient in expected.items():
        assert gradient is not None, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-6)


# -- failure and interruption -----------------------------------------------------------------


def test_loss_that_is_not_finite_names_cases_and_keeps_the_checkpoint(make: Make) -> None:
    trainer = make()
    stop_after(trainer, 2)
    (kept,) = checkpoint_directories(trainer.run_directory / CHECKPOINTS)
    before = weights(trainer)
    with torch.no_grad():
        trainer.model.base.model.norm.weight.fill_(float("nan"))
    with pytest.raises(BackendError, match=r"the safety loss is not finite at step 3") as caught:
        run(trainer)
    cases = [e.id for e in trainer._batch()]
    assert all(case in str(caught.value) for case in cases)
    assert checkpoint_directories(trainer.run_directory / CHECKPOINTS) == [kept]
    assert load_checkpoint(kept).step == 2
    assert all(torch.equal(before[n], weights(trainer)[n]) for n in trainer.names.values())


def test_gradient_that_is_not_finite_is_never_applied(make: Make) -> None:
    """The loss can be finite and its gradient not; one such step would poison every weight."""
    trainer = make(save_every_steps=1)
    before = weights(trainer)
    learned = next(p for p, name in trainer.names.items() if "lora_B" in name)
    handle = learned.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(BackendError, match="the gradient is not finite at step 1"):
        run(trainer)
    assert all(torch.equal(before[n], weights(trainer)[n]) for n in before)
    assert checkpoint_directories(trainer.run_directory / CHECKPOINTS) == []
    handle.remove()
    run(trainer)
    assert trainer.step == trainer.total_steps


def test_a_stop_saves_the_last_whole_step_and_reports_it_first(make: Make) -> None:
    trainer = make()
    seen: list[tuple[int, int]] = []

    def look(report: StepReport) -> None:
        saved = len(checkpoint_directories(trainer.run_directory / CHECKPOINTS))
        seen.append((report.step, saved))

    with pytest.raises(Interrupted) as caught:
        trainer.run(TrainingHooks(look, lambda: trainer.step == 2))
    assert caught.value.exit_code == 130
    assert seen == [(1, 0), (2, 0)]
    (path,) = checkpoint_directories(trainer.run_directory / CHECKPOINTS)
    assert load_checkpoint(path).step == 2


# -- schedule and groups ----------------------------------------------------------------------


@given(total=st.integers(1, 500), warmup_ratio=st.floats(0, 0.99))
def test_schedule_rises_to_one_and_falls_without_reaching_zero(
    total: int, warmup_ratio: float
) -> None:
    factors = [schedule(step, total, warmup_ratio) for step in range(total)]
    peak = max(1, round(total * warmup_ratio)) - 1
    assert factors[min(peak, total - 1)] == 1
    assert all(a < b for a, b in itertools.pairwise(factors[: peak + 1]))
    assert all(a >= b for a, b in zip(factors[peak:], factors[peak + 1 :], strict=False))
    assert all(0 < factor <= 1 for factor in factors)


@pytest.mark.parametrize(
    ("n", "epochs", "max_steps", "expected"),
    [
        (12, 2.0, None, 8),
        (13, 2.0, None, 10),
        (12, 0.5, None, 2),
        (12, 0.01, None, 1),
        (12, 9, 5, 5),
    ],
)
def test_total_steps(
    n: int, epochs: float, max_steps: int | None, expected: int, tmp_path: Path
) -> None:
    config = fit_config(tmp_path, "base", num_epochs=epochs, max_steps=max_steps)
    assert config.cases_per_step == 3
    assert total_steps(n, config) == expected


def test_safety_parameters_have_their_own_learning_rate(make: Make) -> None:
    trainer = make(learning_rate=1e-3, safety_learning_rate=3e-4, warmup_ratio=0.5)
    reports: list[StepReport] = []
    groups = trainer.optimizer.param_groups
    names = [{trainer.names[p] for p in group["params"]} for group in groups]
    assert names[0] | names[1] == set(trainer.names.values())
    assert names[1] == {
        n for n in trainer.names.values() if n.endswith("safe_generators") or "verdict_" in n
    }
    rates: list[tuple[float, float]] = []

    def look(report: StepReport) -> None:
        reports.append(report)
        rates.append((groups[0]["lr"], groups[1]["lr"]))

    run(trainer, look)
    factors = [schedule(step, 4, 0.5) for step in range(4)]
    assert rates == [
        (pytest.approx(1e-3 * factor), pytest.approx(3e-4 * factor)) for factor in factors
    ]
    assert [r.learning_rate for r in reports] == [rate for rate, _ in rates]


def test_each_group_is_clipped_by_itself(make: Make) -> None:
    trainer = make(max_grad_norm=0.01)
    gradients = gradients_of_first_step(trainer)
    for group in trainer.optimizer.param_groups:
        own = [gradients[trainer.names[p]] for p in group["params"]]
        norm = torch.stack([g.norm() for g in own if g is not None]).norm()
        assert float(norm) == pytest.approx(0.01, rel=1e-3)


def test_epoch_counts_whole_passes_even_when_the_last_step_is_short(make: Make) -> None:
    reports: list[StepReport] = []
    run(make(micro_batch_size=5, max_steps=6, num_epochs=2), reports.append)
    assert [r.epoch for r in reports] == pytest.approx([1 / 3, 2 / 3, 1, 4 / 3, 5 / 3, 2])


def test_share_of_replies_follows_the_setting(make: Make) -> None:
    none, some = make("none", task_loss_share=0.0), make("some", task_loss_share=0.5)
    with_reply = [e for e in some.examples if e.reply is not None]
    assert len(with_reply) == 8
    assert not any(learns_reply(e, none.config, 0) for e in with_reply)
    drawn = [[learns_reply(e, some.config, epoch) for e in with_reply] for epoch in range(40)]
    share = sum(map(sum, drawn)) / (40 * len(with_reply))
    assert share == pytest.approx(0.5, abs=0.1)
    assert len({tuple(epoch) for epoch in drawn}) > 1


# -- determinism ------------------------------------------------------------------------------


def test_same_configuration_and_seed_give_identical_weights(make: Make) -> None:
    first, again = (
        weights(run(make(name, lora_dropout=0.2, max_steps=3))) for name in ("first", "again")
    )
    assert all(torch.equal(first[name], again[name]) for name in first)


def test_another_seed_gives_other_weights(make: Make) -> None:
    first, other = (weights(run(make(f"seed{s}", seed=s, max_steps=2))) for s in (0, 1))
    assert not any(torch.equal(first[n], other[n]) for n in first if "lora_A" in n)


def test_training_learns(make: Make) -> None:
    reports: list[StepReport] = []
    run(
        make(max_steps=16, num_epochs=4, learning_rate=1e-2, safety_learning_rate=1e-2),
        reports.append,
    )
    assert reports[-1].safety_loss < 0.5 * reports[0].safety_loss


def test_hash_covers_what_shapes_the_weights_and_nothing_else(tmp_path: Path) -> None:
    config = fit_config(tmp_path, "base")

    def hashed(**changes: object) -> str:
        return training_hash(config.model_copy(update=changes), "sha", [])

    for key, value in {
        "seed": 1,
        "learning_rate": 1e-3,
        "max_steps": 5,
        "lora_r": 8,
        "freeze": "safe",
        "save_every_steps": 7,  # moves the reference of the inertia term
        "task_loss_share": 0.5,
    }.items():
        assert hashed(**{key: value}) != hashed(), key
    for key, value in {
        "output_dir": tmp_path / "elsewhere",
        "eval_every_steps": 3,
        "save_total_limit": 9,
        "adapter_dtype": "float32",
        "max_loss_ratio": 3.0,
    }.items():
        assert hashed(**{key: value}) == hashed(), key
    assert training_hash(config, "another base", []) != hashed()

"""A fit that fails keeps its last whole step, and ends bit-identical when it is resumed."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.file_limit import files_limited_to
from support.tiny_fit import build_trainer, fit_config, ignore_step
from torch import Tensor

from so8t_eval.errors import BackendError, DiskError
from so8t_train import trainer as trainer_module
from so8t_train.checkpoint import checkpoint_directories, load_checkpoint
from so8t_train.divergence import DivergedError
from so8t_train.emergency import saved_on_failure
from so8t_train.step_report import StepReport, TrainingHooks
from so8t_train.trainer import CHECKPOINTS, Trainer

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

SETTINGS = {"lora_dropout": 0.3, "max_steps": 4, "num_epochs": 2, "save_every_steps": 3}
Make = Callable[..., Trainer]


@pytest.fixture
def make(tiny_llama: Path, tmp_path: Path) -> Make:
    def trainer(name: str = "fit", **changes: object) -> Trainer:
        config = fit_config(tmp_path / name, tiny_llama, **SETTINGS, **changes)
        made = build_trainer(config)
        made.session = "cafe0123"
        return made

    return trainer


@pytest.fixture(scope="module")
def expected(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """Weights of the fit that never failed."""
    trainer = build_trainer(fit_config(tmp_path_factory.mktemp("whole"), tiny_llama, **SETTINGS))
    trainer.run(TrainingHooks(ignore_step, lambda: False))
    return weights(trainer)


def weights(trainer: Trainer) -> dict[str, Tensor]:
    return {name: p.detach().clone() for p, name in trainer.names.items()}


def run(trainer: Trainer, on_step: Callable[[StepReport], None] = ignore_step) -> list[str]:
    """Train as ``fit`` does; what it says."""
    news: list[str] = []
    with saved_on_failure(trainer, news.append):
        trainer.run(TrainingHooks(on_step, lambda: False))
    return news


def failing(
    trainer: Trainer,
    error: type[BaseException],
    on_step: Callable[[StepReport], None] = ignore_step,
) -> tuple[str, BaseException]:
    news: list[str] = []
    with pytest.raises(error) as caught, saved_on_failure(trainer, news.append):
        trainer.run(TrainingHooks(on_step, lambda: False))
    return "\n".join(news), caught.value


def checkpoints(trainer: Trainer) -> list[int]:
    found = checkpoint_directories(trainer.run_directory / CHECKPOINTS)
    return [load_checkpoint(path).step for path in found]


def resumed(make: Make, expected_step: int) -> Trainer:
    trainer = make()
    assert trainer.resume(pytest.fail)
    assert trainer.step == expected_step
    assert run(trainer) == []
    return trainer


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def too_much_memory() -> None:
    torch.empty(1 << 50)


def no_memory() -> None:
    raise MemoryError


def no_cuda_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nmore")


def bug() -> None:
    raise ZeroDivisionError("a bug")


def second_interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("fails", "error", "says"),
    [
        (too_much_memory, BackendError, "out of memory at step 3 of 4 .*DefaultCPUAllocator"),
        (no_memory, BackendError, r"out of memory at step 3 of 4 \(MemoryError\); free memory"),
        (no_cuda_memory, BackendError, "out of memory at step 3 of 4 .*allocate 2 GiB"),
        (bug, ZeroDivisionError, "a bug"),
        (second_interrupt, KeyboardInterrupt, ""),
    ],
)
def test_failure_inside_a_step_keeps_the_step_before_it(  # noqa: PLR0917
    fails: Callable[[], None],
    error: type[BaseException],
    says: str,
    make: Make,
    expected: dict[str, Tensor],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """It strikes after the verdict pass: gradients are there, and dropout has drawn."""
    trainer = make()
    original = trainer_module.task_loss

    def task_loss(*arguments: object) -> Tensor:
        if trainer.step == 2:
            fails()
        return original(*arguments)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "task_loss", task_loss)
        news, caught = failing(trainer, error)
    assert type(caught) is error
    assert re.search(says, str(caught))
    (path,) = checkpoint_directories(trainer.run_directory / CHECKPOINTS)
    assert news == (
        f"session cafe0123 failed: emergency checkpoint {path}; continue with --resume auto"
    )
    saved = load_checkpoint(path)
    assert (saved.step, saved.session, saved.emergency) == (2, "cafe0123", True)
    assert equal(weights(resumed(make, 2)), expected)


def test_half_updated_weights_are_never_saved(make: Make, expected: dict[str, Tensor]) -> None:
    trainer = make()

    def fail(*_: object) -> None:
        if trainer.step == 3:
            raise ZeroDivisionError

    with trainer.optimizer.register_step_post_hook(fail):
        news, _ = failing(trainer, ZeroDivisionError)
    assert "fell into the update of the weights, which is not saved half done" in news
    assert checkpoints(trainer) == [3]
    with pytest.raises(RuntimeError, match="half updated"):
        trainer.save()
    assert equal(weights(resumed(make, 3)), expected)


def test_full_disk_keeps_the_checkpoint_before(make: Make, expected: dict[str, Tensor]) -> None:
    trainer = make()

    def full_at_the_end(report: StepReport) -> None:
        if report.step == 4:
            limit.__enter__()

    limit = files_limited_to(4096)
    try:
        news, error = failing(trainer, DiskError, full_at_the_end)
    finally:
        limit.__exit__(None, None, None)
    assert "cannot write the checkpoint" in str(error)
    assert "no emergency checkpoint (cannot write the checkpoint" in news
    assert checkpoints(trainer) == [3]
    assert equal(weights(resumed(make, 3)), expected)


def test_failure_while_a_step_is_reported_keeps_that_step(
    make: Make, expected: dict[str, Tensor]
) -> None:
    trainer = make()

    def fail(report: StepReport) -> None:
        if report.step == 2:
            raise DiskError("cannot write train_log.jsonl")

    failing(trainer, DiskError, fail)
    assert checkpoints(trainer) == [2]
    assert equal(weights(resumed(make, 2)), expected)


def test_failure_in_the_first_step_has_nothing_to_keep(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make()
    monkeypatch.setattr(trainer_module, "safety_loss", lambda *_, **__: bug())
    news, _ = failing(trainer, ZeroDivisionError)
    assert news == "session cafe0123 failed: no step was done yet; there is nothing to keep"
    assert checkpoints(trainer) == []


def test_failed_dev_evaluation_still_reports_its_step(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make(eval_every_steps=2)
    trainer.dev = trainer.examples
    seen: list[int] = []
    monkeypatch.setattr(trainer_module, "evaluate_dev", lambda *_: bug())
    failing(trainer, ZeroDivisionError, lambda report: seen.append(report.step))
    assert seen == [1, 2]
    assert checkpoints(trainer) == [2]


# -- divergence -------------------------------------------------------------------------------


def test_exploded_loss_names_every_case_and_is_not_saved(make: Make) -> None:
    trainer = make(learning_rate=300.0, safety_learning_rate=300.0, max_loss_ratio=1.2)
    news, error = failing(trainer, DivergedError)
    assert news == ""
    text = str(error)
    assert "the loss has exploded to" in text
    assert "max_loss_ratio=1.2 times an untrained model's" in text
    assert "(session cafe0123)" in text
    assert all(example.id in text for example in trainer._batch())
    assert checkpoints(trainer) == []
    assert trainer.step >= 1


def test_a_weight_that_is_not_finite_is_not_saved_over_good_checkpoints(make: Make) -> None:
    trainer = make()

    def spoil(report: StepReport) -> None:
        if report.step == 4:
            with torch.no_grad():
                next(iter(trainer.names)).view(-1)[0] = float("nan")

    _, error = failing(trainer, DivergedError, spoil)
    assert "a weight or its optimizer state is not finite at step 4 on cases" in str(error)
    assert all(example.id in str(error) for example in trainer._batch(3))
    assert checkpoints(trainer) == [3]

"""The category head: what it learns, whom it teaches, and that nothing of it is left in a run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.tiny_fit import QUIET, build_trainer, fit_config, ignore_step
from torch import Tensor

from so8t_eval.errors import Interrupted
from so8t_train.category_head import CategoryHead
from so8t_train.config import FitConfig
from so8t_train.fit import fit
from so8t_train.losses import safety_loss
from so8t_train.packing import pack
from so8t_train.run_dir import load_run
from so8t_train.trainer import Trainer, TrainingHooks
from so8t_train.training_plan import HEAD_RATE, training_hash

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

NAMES = ("ref/cyber", "ok/code", "esc/advice")
ON = {"category_loss_weight": 0.5, "pet_weight": 0.0, "pet_inertia_weight": 0.0}

Make = Callable[..., Trainer]


@pytest.fixture
def config(tiny_llama: Path, tmp_path: Path) -> Callable[..., FitConfig]:
    def with_changes(name: str = "fit", **changes: object) -> FitConfig:
        return fit_config(tmp_path / name, tiny_llama, **changes)

    return with_changes


def first_gradients(trainer: Trainer) -> dict[str, Tensor | None]:
    """Gradients as the optimizer met them in the first step."""
    seen: dict[str, Tensor | None] = {}

    def look(*_: object) -> None:
        for parameter, name in trainer.names.items():
            seen[name] = None if parameter.grad is None else parameter.grad.clone()

    with trainer.optimizer.register_step_pre_hook(look), pytest.raises(Interrupted):
        trainer.run(TrainingHooks(ignore_step, lambda: True))
    return seen


def test_a_fresh_head_finds_every_category_equally_likely() -> None:
    head = CategoryHead(8, [*NAMES, *NAMES], torch.device("cpu"))
    states = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(head.cross_entropy(states, NAMES), torch.full((3,), 3.0).log())


def test_it_is_the_cross_entropy_of_a_linear_layer_over_sorted_names() -> None:
    rng = torch.Generator().manual_seed(2)
    head = CategoryHead(8, NAMES, torch.device("cpu"))
    with torch.no_grad():
        head.weight.copy_(torch.randn(3, 8, generator=rng))
        head.bias.copy_(torch.randn(3, generator=rng))
    states = torch.randn(3, 8, generator=rng).bfloat16()
    scores = states.float() @ head.weight.T + head.bias
    expected = F.cross_entropy(scores, torch.tensor([2, 1, 0]), reduction="none")
    torch.testing.assert_close(head.cross_entropy(states, NAMES), expected)


def test_an_unknown_category_is_an_error() -> None:
    head = CategoryHead(8, NAMES, torch.device("cpu"))
    with pytest.raises(KeyError, match="ok/new"):
        head.cross_entropy(torch.zeros(1, 8), ["ok/new"])


def test_the_loss_weighs_categories_as_the_verdict_loss_weighs_its_cases(
    config: Callable[..., FitConfig],
) -> None:
    trainer = build_trainer(config(**ON))
    assert trainer.head is not None
    examples = trainer.examples[:4]
    items = [e.prompt._replace(weight=w) for e, w in zip(examples, (1, 2, 0, 5), strict=True)]
    result = safety_loss(
        trainer.model,
        pack(items, trainer.model.device),
        label_smoothing=0,
        with_temporal=False,
        head=trainer.head,
        categories=[e.category for e in examples],
    )
    n = len({e.category for e in trainer.examples})
    assert n > 1
    assert float(result.category_sum.detach()) == pytest.approx(8 * float(torch.tensor(n).log()))


def test_it_teaches_lora_and_r_safe_and_never_r_cmd(config: Callable[..., FitConfig]) -> None:
    """Alone: without verdict and reply losses, from a head that is not zero."""
    trainer = build_trainer(config(task_loss_weight=0.0, rotation_init_std=0.2, seed=5, **ON))
    assert trainer.head is not None
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        trainer.head.weight.copy_(torch.randn(trainer.head.weight.shape, generator=rng))
    without = build_trainer(config("without", task_loss_weight=0.0, rotation_init_std=0.2, seed=5))
    with_head, plain = first_gradients(trainer), first_gradients(without)
    head = [name for name in with_head if name.startswith("category_head.")]
    assert sorted(head) == ["category_head.bias", "category_head.weight"]
    for name, gradient in with_head.items():
        if name.endswith("command_generators"):
            assert gradient is None or not gradient.any()
        elif name.endswith("safe_generators") or "lora_B" in name:
            assert gradient is not None
            assert plain[name] is not None
            assert not torch.allclose(gradient, plain[name])  # type: ignore[arg-type]


def test_it_has_a_learning_rate_of_its_own(config: Callable[..., FitConfig]) -> None:
    trainer = build_trainer(config(safety_learning_rate=3e-4, **ON))
    rates = {
        trainer.names[p]: g["peak_lr"] for g in trainer.optimizer.param_groups for p in g["params"]
    }
    assert set(rates) == set(trainer.names.values())
    assert rates["category_head.weight"] == pytest.approx(HEAD_RATE * 3e-4)
    assert rates["verdict_rows"] == pytest.approx(3e-4)


def test_off_there_is_no_head_and_no_figure(config: Callable[..., FitConfig]) -> None:
    trainer = build_trainer(config())
    assert trainer.head is None
    assert trainer.train_step().category_loss is None


def test_its_weight_and_the_categories_are_part_of_the_training_only_when_it_is_on(
    config: Callable[..., FitConfig],
) -> None:
    examples = build_trainer(config()).examples
    renamed = [example._replace(category="ok/other") for example in examples]

    def digest(read: object, **changes: object) -> str:
        return training_hash(config(**changes), "base", read)  # type: ignore[arg-type]

    assert digest(examples) == digest(renamed)
    assert digest(examples, **ON) != digest(renamed, **ON)
    assert digest(examples, **ON) != digest(examples, **(ON | {"category_loss_weight": 0.25}))


def test_a_resumed_fit_ends_with_the_weights_of_one_that_was_never_stopped(
    config: Callable[..., FitConfig],
) -> None:
    whole = build_trainer(config("whole", **ON))
    whole.run(TrainingHooks(ignore_step, lambda: False))
    stopped = build_trainer(config("stopped", **ON))
    with pytest.raises(Interrupted):
        stopped.run(TrainingHooks(ignore_step, lambda: stopped.step >= 2))
    resumed = build_trainer(config("stopped", **ON))
    assert resumed.resume(lambda _warning: None)
    resumed.run(TrainingHooks(ignore_step, lambda: False))
    assert whole.step == resumed.step > 2
    theirs = {name: parameter for parameter, name in whole.names.items()}
    for parameter, name in resumed.names.items():
        assert torch.equal(parameter, theirs[name]), name
    assert bool(theirs["category_head.weight"].any())


def test_a_run_directory_has_nothing_of_it(config: Callable[..., FitConfig]) -> None:
    settings = config(**ON)
    fit(settings, resume=False, reporter=QUIET)
    run = load_run(settings.output_dir)
    assert run.manifest.config.category_loss_weight == 0.5
    assert not any("category" in name for name, _ in run.model.named_parameters())
    log = (settings.output_dir / "train_log.jsonl").read_text(encoding="utf-8")
    assert '"category_loss": ' in log
    assert '"category_loss": null' not in log

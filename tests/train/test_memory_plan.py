"""The memory plan against what autograd really keeps, and against the trainer's own passes."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from support.case_files import write_cases
from support.tiny_fit import build, fit_config, ignore_step, training_cases
from support.tiny_hf import Family, make_tiny_model
from torch import nn

from so8t_train.losses import safety_loss, task_loss
from so8t_train.memory_plan import (
    Setting,
    base_bytes,
    held_bytes,
    layer_bytes_per_token,
    pass_memory,
    plan_memory,
    trained_parameters,
)
from so8t_train.model_shape import locate_base, read_shape
from so8t_train.packing import Pack, PackedSequence, pack
from so8t_train.pass_sizes import PassSize, fit_passes
from so8t_train.quantized_layers import quantized_layers
from so8t_train.safety_model import SafetyModel
from so8t_train.trainer import Trainer, TrainingHooks
from so8t_train.training_data import load_training_cases, tokenize_cases, weighted


def make_trainer(directory: Path, base: Path, dtype: torch.dtype, **changes: object) -> Trainer:
    directory.mkdir(parents=True, exist_ok=True)
    train = write_cases(directory / "all.jsonl", training_cases(24))
    config = fit_config(directory, base, train_file=train, **changes)
    model, tokenizer = build(config, dtype)
    cases = load_training_cases(config.train_file)
    data = tokenize_cases(cases, tokenizer, model.verdict_ids, None, config.max_length)
    return Trainer(
        model,
        config,
        examples=weighted(data, config).examples,
        dev=[],
        run_directory=config.output_dir,
        start_sha256="base",
    )


def setting_of(trainer: Trainer) -> Setting:
    shape = read_shape(locate_base(trainer.config.base_model))
    return Setting(shape, trainer.config, "cpu", trainer.model.dtype.itemsize, True)


def kept_bytes(compute: Callable[[], object], model: nn.Module) -> int:
    """Bytes of the storages that autograd keeps for the result of ``compute``, weights aside."""
    fixed = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in fixed:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = compute()  # while it lives, what is kept has addresses of its own
    assert result is not None
    return sum(storages.values())


@pytest.mark.parametrize(
    ("family", "dtype", "changes"),
    [
        ("llama", torch.bfloat16, {"load_in_8bit": True}),
        ("llama", torch.float32, {"load_in_8bit": True}),
        ("llama", torch.float32, {"load_in_8bit": False, "load_in_4bit": True}),
        (
            "llama",
            torch.float32,
            {"load_in_8bit": False, "load_in_4bit": True, "lora_dropout": 0.1},
        ),
        ("llama", torch.float32, {}),
        ("llama", torch.bfloat16, {}),
        ("llama", torch.float32, {"lora_dropout": 0.1}),
        ("llama", torch.bfloat16, {"load_in_8bit": True, "lora_dropout": 0.1}),
        ("llama", torch.bfloat16, {"load_in_8bit": True, "rotation_gates": False}),
        ("qwen3", torch.bfloat16, {"load_in_8bit": True}),
        ("phi3", torch.bfloat16, {"load_in_8bit": True}),
    ],
)
def test_activations_per_token_are_those_that_autograd_keeps(
    tmp_path: Path,
    family: Family,
    dtype: torch.dtype,
    changes: dict[str, object],
) -> None:
    kept: dict[str, list[float]] = {"verdict": [], "reply": []}
    for layers in (1, 3):  # the difference is that of two layers, without embedding and logits
        base = make_tiny_model(tmp_path / f"{layers}", family, hidden=128, layers=layers)
        trainer = make_trainer(tmp_path / f"fit{layers}", base, dtype, **changes)
        model = trainer.model.train()
        if model.bank is not None:
            model.bank.begin_step()
        replies = [e.reply for e in trainer.examples if e.reply is not None]
        for kind, sequences in (
            ("verdict", [e.prompt for e in trainer.examples]),
            ("reply", replies),
        ):
            found = kept_bytes(loss_of(model, kind, pack(sequences, model.device)), model)
            kept[kind].append(found / pack(sequences, model.device).tokens)
    for kind, (few, many) in kept.items():
        temporal = kind == "verdict" and trainer.config.rotation_gates
        predicted = layer_bytes_per_token(setting_of(trainer), temporal=temporal)
        assert predicted == pytest.approx((many - few) / 2, rel=0.04), kind


def loss_of(model: SafetyModel, kind: str, packed: Pack) -> Callable[[], object]:
    if kind == "reply":
        return lambda: task_loss(model, packed)
    return lambda: safety_loss(model, packed, label_smoothing=0.0, with_temporal=True)


@pytest.mark.parametrize("freeze", ["none", "safe"])
def test_parameters_that_learn_are_counted(tiny_llama: Path, tmp_path: Path, freeze: str) -> None:
    trainer = make_trainer(tmp_path, tiny_llama, torch.float32, freeze=freeze)
    setting = setting_of(trainer)
    learning = sum(p.numel() for p in trainer.names)
    assert trained_parameters(setting.shape, trainer.config) == learning


def test_8bit_base_and_held_weights_are_counted(tiny_llama: Path, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, tiny_llama, torch.bfloat16, load_in_8bit=True)
    setting = setting_of(trainer)
    frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
    state = sum(p.numel() * p.itemsize for p in frozen if p.ndim > 1)
    scales = sum(linear.n_out for linear in setting.shape.linears) * 4 * 2
    assert base_bytes(setting) == state + scales
    assert held_bytes(setting) == setting.shape.linear_parameters * 2


@pytest.mark.parametrize("double_quant", [True, False])
def test_4bit_base_is_counted(tiny_llama: Path, tmp_path: Path, double_quant: bool) -> None:
    changes = {
        "load_in_8bit": False,
        "load_in_4bit": True,
        "bnb_4bit_use_double_quant": double_quant,
    }
    trainer = make_trainer(tmp_path, tiny_llama, torch.float32, **changes)
    setting = setting_of(trainer)
    tensors = [p for p in trainer.model.parameters() if not p.requires_grad and p.ndim > 1]
    for layer in quantized_layers(trainer.model):
        state = layer.weight.quant_state  # type: ignore[union-attr]
        tensors += [state.absmax, state.code]
        if double_quant:
            tensors += [state.offset, state.state2.absmax, state.state2.code]
    assert base_bytes(setting) == sum(t.numel() * t.itemsize for t in tensors)
    assert held_bytes(setting) == setting.shape.linear_parameters * 4


def test_passes_are_those_of_the_trainer(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(
        tmp_path,
        tiny_llama,
        torch.float32,
        micro_batch_size=4,
        gradient_accumulation_steps=3,
        task_loss_share=0.6,
        max_steps=None,
        num_epochs=2.0,
        max_length=192,
    )
    packed: list[tuple[int, int, int]] = []

    def observed(sequences: Sequence[PackedSequence], device: torch.device) -> Pack:
        made = pack(sequences, device)
        packed.append((trainer.step, made.tokens, len(made.targets)))
        return made

    monkeypatch.setattr("so8t_train.trainer.pack", observed)
    trainer.run(TrainingHooks(ignore_step, lambda: False))
    planned = fit_passes(trainer.examples, trainer.config)
    assert {size.kind for size in planned} == {"verdict", "reply"}
    assert [(s.step, s.tokens, s.supervised) for s in planned] == packed


def test_weights_stay_mapped_where_none_is_cast(tiny_llama: Path, tmp_path: Path) -> None:
    plain = setting_of(make_trainer(tmp_path, tiny_llama, torch.float32, load_in_8bit=True))
    assert mapped_bytes(plain) == plain.shape.linear_parameters * 4  # the file is float32
    assert mapped_bytes(plain._replace(item_bytes=2)) == 0
    assert mapped_bytes(plain._replace(shape=plain.shape._replace(is_gguf=True))) == 0
    unquantized = plain.config.model_copy(update={"load_in_8bit": False})
    assert mapped_bytes(plain._replace(config=unquantized)) == 0  # then it is the base itself


def mapped_bytes(setting: Setting) -> int:
    plan = plan_memory(setting, [PassSize("verdict", 0, 64, 1, 64, 1)], imports=0, token_ids=0)
    hold = next(phase for phase in plan.phases if phase.name == "hold")
    return dict(hold.parts)["mapped file"]


def test_checkpointing_leaves_holes_of_what_it_does_not_keep(
    tiny_llama: Path, tmp_path: Path
) -> None:
    trainer = make_trainer(tmp_path, tiny_llama, torch.float32)
    plain = setting_of(trainer)
    kept = plain._replace(config=plain.config.model_copy(update={"gradient_checkpointing": False}))
    freed = plain._replace(config=plain.config.model_copy(update={"gradient_checkpointing": True}))
    size = PassSize("reply", 0, 500, 20, 250, 2)
    assert pass_memory(kept, size).freed == 0
    both = pass_memory(freed, size)
    assert both.activations + both.freed == pass_memory(kept, size).activations

"""A training configuration, cases and a trainer small enough for tests."""

from pathlib import Path

import torch
from support.case_files import case_dict, write_cases

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_train.base_model import resolve_base
from so8t_train.config import FitConfig, parse_config
from so8t_train.fit import FitReporter
from so8t_train.safety_model import SafetyModel, build_safety_model
from so8t_train.trainer import StepReport, Trainer
from so8t_train.training_data import load_training_cases, tokenize_cases, weighted

QUIET = FitReporter(news=lambda _text: None, on_step=lambda _report, _memory: None)
POLICIES = (None, "Ask a person before you delete files.", "Sure, help with office work.")


def training_cases(n: int, first: int = 0) -> list[dict[str, object]]:
    """Cases with verdicts in turn, three policies, and a reply on two of three."""
    return [
        case_dict(
            i,
            policy=POLICIES[i // 3 % 3],
            reply=None if i % 3 == 1 else f"Sure, here is the answer to request {i}.",
        )
        for i in range(first, first + n)
    ]


def fit_config(directory: Path, base: Path | str, **changes: object) -> FitConfig:
    """A fit of four steps over twelve cases on a float base; case files go to ``directory``."""
    directory.mkdir(parents=True, exist_ok=True)
    values: dict[str, object] = {
        "base_model": str(base),
        "train_file": write_cases(directory / "train.jsonl", training_cases(12)),
        "dev_file": write_cases(directory / "dev.jsonl", training_cases(6, first=90)),
        "output_dir": directory / "run",
        "load_in_8bit": False,
        "compute_dtype": "float32",
        "device_map": "cpu",
        "lora_r": 4,
        "micro_batch_size": 3,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "learning_rate": 5e-3,
        "safety_learning_rate": 5e-3,
        "max_steps": 4,
        "max_length": 256,
        "threads": 1,
        "eval_every_steps": 100,
    }
    return parse_config({**values, **changes}, "test")


def build(config: FitConfig, dtype: torch.dtype = torch.float32) -> tuple[SafetyModel, HfTokenizer]:
    return build_safety_model(resolve_base(config.base_model), config, dtype)


def build_trainer(config: FitConfig) -> Trainer:
    """A trainer as ``fit`` makes it, without its logs, signals and final save."""
    model, tokenizer = build(config)
    cases = load_training_cases(config.train_file)
    tokenized = tokenize_cases(cases, tokenizer, model.verdict_ids, None, config.max_length)
    data = weighted(tokenized, config)
    return Trainer(
        model,
        config,
        examples=data.examples,
        dev=[],
        run_directory=config.output_dir,
        start_sha256="base",
    )


def ignore_step(_report: StepReport) -> None:
    """An ``on_step`` that looks away."""

"""A tiny run directory: a random base with random LoRA, rotations and verdict rows, saved whole."""

from pathlib import Path

import torch
from support.tiny_hf import make_tiny_model

from so8t_train.base_model import resolve_base
from so8t_train.config import FitConfig
from so8t_train.run_dir import save_run
from so8t_train.safety_model import build_safety_model


def make_tiny_run(
    directory: Path,
    *,
    load_in_8bit: bool = True,
    load_in_4bit: bool = False,
    rotation_gates: bool = True,
    tied: bool = True,
    temperature: float = 1.5,
) -> Path:
    """Write base and run below ``directory``; returns the run directory."""
    base = make_tiny_model(directory / "base", tied=tied)
    config = FitConfig(
        base_model=str(base),
        train_file=("unused.jsonl",),
        output_dir=directory / "run",
        device_map="cpu",
        load_in_8bit=load_in_8bit,
        load_in_4bit=load_in_4bit,
        lora_r=4,
        rotation_gates=rotation_gates,
        rotation_init_std=0.3,
    )
    source = resolve_base(config.base_model)
    model, tokenizer = build_safety_model(source, config, torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or name.startswith("verdict_"):
                parameter.normal_(std=0.1)
    model.temperature = temperature
    save_run(config.output_dir, model, tokenizer, source, config, {})
    return config.output_dir

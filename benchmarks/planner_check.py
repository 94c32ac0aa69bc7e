"""Does ``so8t-train plan`` predict the memory that ``so8t-train fit`` then takes?

    python benchmarks/planner_check.py [NAME...] [--steps 3] [--threads 1] [--keep DIR]

Each configuration is really fitted for a few steps, in a process of its own, and what the fit then
recorded is shown: every phase's predicted and measured peak. So that few steps meet the longest
batch, the training file holds the cases of the step whose passes the planner finds largest, and
nothing else. The peak of the process is that of its largest phase. Exit code 1 if a peak is off by
more than 15 %.
"""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

if TYPE_CHECKING:
    from so8t_train.memory_phases import MemoryPhases

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "so8t_train" / "reference" / "fit.yaml"
TOLERANCE = 0.15
SMALL_PASSES: dict[str, Any] = {"micro_batch_size": 4, "gradient_accumulation_steps": 4}


def reference(_directory: Path) -> dict[str, Any]:
    """The reference configuration as it is."""
    return {}


def checkpointed(_directory: Path) -> dict[str, Any]:
    """The reference with gradient checkpointing and small micro-batches."""
    return {"gradient_checkpointing": True} | SMALL_PASSES


def random_base(directory: Path, family: str, **sizes: Any) -> str:
    """The path of a random model in ``directory``, made once."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny_hf import make_tiny_model

    base = directory / "base"
    if not base.is_dir():
        make_tiny_model(base, family, **sizes)
    return str(base)


def random_llama(directory: Path) -> dict[str, Any]:
    """A random Llama of 0.3 billion parameters, 8-bit, two cases per pass."""
    return {
        "base_model": random_base(directory, "llama", hidden=1024, layers=29, spare_rows=31552),
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "max_length": 1024,
    }


def float_qwen(directory: Path) -> dict[str, Any]:
    """A random Qwen3, base not in 8-bit: PEFT's own layers."""
    return {
        "base_model": random_base(
            directory, "qwen3", hidden=512, layers=12, tied=False, spare_rows=31552
        ),
        "load_in_8bit": False,
    } | SMALL_PASSES


def checkpointed_qwen(directory: Path) -> dict[str, Any]:
    """A random Qwen2, 8-bit, checkpointed."""
    return {
        "base_model": random_base(directory, "qwen2", hidden=768, layers=14, spare_rows=31552),
        "gradient_checkpointing": True,
        "micro_batch_size": 8,
        "gradient_accumulation_steps": 2,
    }


def fused_phi(directory: Path) -> dict[str, Any]:
    """A random Phi 3, 8-bit, joined projections. No constant was chosen by its result."""
    return {
        "base_model": random_base(directory, "phi3", hidden=640, layers=10, spare_rows=31552),
        "max_length": 512,
    } | SMALL_PASSES


def four_bit(_directory: Path) -> dict[str, Any]:
    """The reference on a 4-bit base. No constant was chosen by its result."""
    return {"load_in_8bit": False, "load_in_4bit": True} | SMALL_PASSES


def four_bit_checkpointed(_directory: Path) -> dict[str, Any]:
    """The reference on a 4-bit base, checkpointed. No constant was chosen by its result."""
    return four_bit(_directory) | {"gradient_checkpointing": True}


CONFIGURATIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "reference": reference,
    "checkpointed": checkpointed,
    "llama-0.3b": random_llama,
    "qwen3-float": float_qwen,
    "qwen2-checkpointed": checkpointed_qwen,
    "phi3": fused_phi,
    "reference-4bit": four_bit,
    "reference-4bit-checkpointed": four_bit_checkpointed,
}


def write_configuration(name: str, directory: Path, steps: int, threads: int) -> Path:
    """A configuration whose every step is the largest step of the whole fit."""
    from so8t_eval.atomic_write import atomic_write_text
    from so8t_train.config import load_config
    from so8t_train.fit_plan import tokenized_examples
    from so8t_train.model_shape import locate_base
    from so8t_train.pass_sizes import fit_passes
    from so8t_train.training_data import load_training_cases, step_order

    directory.mkdir(parents=True, exist_ok=True)
    shipped = load_config(REFERENCE)
    values = yaml.safe_load(REFERENCE.read_text(encoding="utf-8"))
    values |= CONFIGURATIONS[name](directory)
    values |= {"train_file": [str(file) for file in shipped.train_file], "dev_file": []}
    values |= {"output_dir": str(directory / "run"), "threads": threads}
    path = directory / "fit.yaml"
    atomic_write_text(path, yaml.safe_dump(values))
    config = load_config(path)
    examples = tokenized_examples(config, locate_base(config.base_model)).examples
    largest = max(fit_passes(examples, config), key=lambda size: size.tokens)
    epoch, index = divmod(largest.step, -(-len(examples) // config.cases_per_step))
    order = step_order(len(examples), config.cases_per_step, epoch, config.seed)[index]
    wanted = {examples[i].id for i in order}
    cases = [case for case in load_training_cases(config.train_file) if case.id in wanted]
    lines = [case.model_dump_json(exclude_none=True) + "\n" for case in cases]
    atomic_write_text(directory / "train.jsonl", "".join(lines))
    values |= {"train_file": "train.jsonl", "num_epochs": float(steps), "max_steps": steps}
    atomic_write_text(path, yaml.safe_dump(values))
    return path


def fitted_phases(config_file: Path) -> "MemoryPhases":
    """Fit in a process of its own; what the fit recorded of its memory."""
    from so8t_train.config import load_config
    from so8t_train.memory_phases import read_phases

    output = load_config(config_file).output_dir
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "so8t_train.cli", "fit", str(config_file)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    phases = read_phases(output)
    if done.returncode or phases is None:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return phases


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(list(CONFIGURATIONS)))
@click.option("--steps", default=3, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--keep", type=click.Path(path_type=Path), help="Directory for models and runs.")
def main(names: tuple[str, ...], steps: int, threads: int, keep: Path | None) -> None:
    """Compare predicted and measured peaks."""
    with contextlib.ExitStack() as stack:
        directory = keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        errors = [
            compare(name, write_configuration(name, directory / name, steps, threads))
            for name in names or CONFIGURATIONS
        ]
    sys.exit(any(abs(error) > TOLERANCE for error in errors))


def compare(name: str, config_file: Path) -> float:
    """Print one configuration's phases; the relative error of the predicted peak."""
    fitted = fitted_phases(config_file)
    rows = [(phase, fitted.predicted[phase], truth) for phase, truth in fitted.measured.items()]
    peaks = max(fitted.predicted.values()), max(fitted.measured.values())
    print(f"{name}\n  {'phase':<10}{'predicted':>12}{'measured':>12}{'error':>9}")
    for phase, guess, truth in (*rows, ("peak", *peaks)):
        print(f"  {phase:<10}{guess:8.3f} GiB{truth:8.3f} GiB{guess / truth - 1:+9.1%}", flush=True)
    return peaks[0] / peaks[1] - 1


if __name__ == "__main__":
    main()

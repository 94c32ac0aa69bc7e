"""Does ``so8t-train plan`` predict the memory that ``so8t-train fit`` then takes?

    python benchmarks/planner_check.py [NAME...] [--steps 3] [--threads 1] [--keep DIR]

Each configuration is predicted and then really fitted for a few steps, in a process of its own. So
that few steps meet the longest batch, the training file holds the cases of the step whose passes
the planner finds largest, and nothing else. Measured is the peak resident size of every phase
(Linux; its high-water mark is reset between phases); the peak of the process is the largest of
them. Exit code 1 if a peak is off by more than 15 %.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import yaml

ROOT = Path(__file__).resolve().parents[1]
REFERENCE = ROOT / "so8t_train" / "reference" / "fit.yaml"
TOLERANCE = 0.15
GIB = float(1 << 30)


def reference(_directory: Path) -> dict[str, Any]:
    """The reference configuration as it is."""
    return {}


def checkpointed(_directory: Path) -> dict[str, Any]:
    """The reference with gradient checkpointing and small micro-batches."""
    return {
        "gradient_checkpointing": True,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 4,
    }


def random_llama(directory: Path) -> dict[str, Any]:
    """A random Llama of 0.3 billion parameters, 8-bit, two cases per pass."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny_hf import make_tiny_model

    base = directory / "base"
    if not base.is_dir():
        make_tiny_model(base, "llama", hidden=1024, layers=29, spare_rows=31552)
    return {
        "base_model": str(base),
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 8,
        "max_length": 1024,
    }


def float_qwen(directory: Path) -> dict[str, Any]:
    """A random Qwen3, base not in 8-bit: PEFT's own layers. No constant was chosen by its result."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.tiny_hf import make_tiny_model

    base = directory / "base"
    if not base.is_dir():
        make_tiny_model(base, "qwen3", hidden=512, layers=12, tied=False, spare_rows=31552)
    return {
        "base_model": str(base),
        "load_in_8bit": False,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 4,
    }


CONFIGURATIONS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "reference": reference,
    "checkpointed": checkpointed,
    "llama-0.3b": random_llama,
    "qwen3-float": float_qwen,
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


def measured_phases(config_file: Path) -> dict[str, float]:
    """Fit in this process; peak resident GiB of every phase."""
    from so8t_train import fit as module
    from so8t_train.config import load_config
    from so8t_train.fit_plan import imported_bytes
    from so8t_train.memory_phases import PhasePeaks

    imports = imported_bytes() / GIB
    peaks = PhasePeaks()
    build, trainer = module.build_safety_model, module.Trainer

    def building(*arguments: Any) -> Any:
        built = build(*arguments)
        peaks.ends("load")
        return built

    def training(*arguments: Any, **options: Any) -> Any:
        made = trainer(*arguments, **options)
        peaks.ends("hold")
        return made

    module.build_safety_model, module.Trainer = building, training  # type: ignore[assignment,misc]
    reporter = module.FitReporter(
        lambda news: peaks.ends("train") if news.startswith("calibrating") else None,
        lambda _report, _memory: peaks.ends("train"),
    )
    module.fit(load_config(config_file), resume=False, reporter=reporter)
    peaks.ends("save")
    return {"imports": imports, **peaks.measured}


def in_own_process(mode: str, config_file: Path) -> dict[str, Any]:
    command = [sys.executable, __file__, mode, str(config_file)]
    environment = os.environ | {"OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


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
    predicted = in_own_process("--predict", config_file)
    measured = in_own_process("--measure", config_file)
    print(f"{name}\n  {'phase':<10}{'predicted':>12}{'measured':>12}{'error':>9}")
    rows = [(phase, predicted.get(phase), measured[phase]) for phase in measured]
    peaks = predicted["peak"], max(measured.values())
    for phase, guess, truth in (*rows, ("peak", *peaks)):
        shown = (
            "" if guess is None else f"{guess:8.3f} GiB{truth:8.3f} GiB{guess / truth - 1:+9.1%}"
        )
        print(f"  {phase:<10}{shown or f'{truth:20.3f} GiB'}", flush=True)
    return peaks[0] / peaks[1] - 1


def predicted_phases(config_file: Path) -> dict[str, float]:
    from so8t_train.config import load_config
    from so8t_train.fit_plan import plan_fit

    memory = plan_fit(load_config(config_file)).memory
    peaks = {phase.name: phase.total / GIB for phase in memory.phases}
    return {"imports": memory.imports / GIB, **peaks, "peak": memory.peak / GIB}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measured_phases(Path(sys.argv[2]))))
    elif sys.argv[1:2] == ["--predict"]:
        print(json.dumps(predicted_phases(Path(sys.argv[2]))))
    else:
        main()

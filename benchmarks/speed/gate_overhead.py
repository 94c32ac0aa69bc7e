"""What the rotation gates and PET cost of a training step, and the gates of a judged case.

Run: python benchmarks/speed/gate_overhead.py [--steps 12] [--threads 2]

Three trainers of one process, on the same base, cases and order: LoRA and verdict rows alone, with
rotation gates, with gates and PET. They take turns step by step, so that what else the machine does
falls on all of them alike; a step's ratio is to the bare one beside it, and the median is shown.
Then their models judge the same cases in turn. Times are processor time, divided by the threads,
which other work on the machine hardly moves. Settings are the reference configuration's. Writes
nothing.
"""

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch

from so8t_eval.backends.cpu_threads import default_threads
from so8t_train.base_model import resolve_base
from so8t_train.compute_dtype import compute_dtype
from so8t_train.config import load_config
from so8t_train.dev_evaluation import dev_logits
from so8t_train.safety_model import build_safety_model
from so8t_train.trainer import Trainer
from so8t_train.training_data import class_weights, load_training_cases, tokenize_cases

REFERENCE: Final = Path(__file__).parents[2] / "so8t_train" / "reference" / "fit.yaml"
BARE: Final = "LoRA, verdict rows"
GATED: Final = "+ rotation gates"
VARIANTS: Final[dict[str, dict[str, object]]] = {
    BARE: {"rotation_gates": False, "pet_weight": 0.0, "pet_inertia_weight": 0.0},
    GATED: {"pet_weight": 0.0, "pet_inertia_weight": 0.0},
    "+ gates and PET": {},
}
MOST: Final = 1.05
"""Times the bare step that a gated one may take."""
WARM_UP: Final = 2
JUDGED_CASES: Final = 64


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    with trainers(options) as entries:
        dtype = str(next(iter(entries.values())).model.dtype).removeprefix("torch.")
        print(
            f"machine   {platform.platform()}, {options.threads} threads, torch "
            f"{torch.__version__}, {dtype}"
        )
        steps = in_turn(entries, options.steps)
        judged = judged_in_turn(entries, options.rounds)
    print(f"\n{options.steps} training steps each, in turn; then {JUDGED_CASES} cases judged\n")
    print("| | s per step, median | of the bare step | s judged, median | of the bare model |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name in entries:
        print(
            f"| {name} | {statistics.median(steps[name]):.2f} | {ratio(steps, name):.3f}x "
            f"| {statistics.median(judged[name]):.2f} | {ratio(judged, name):.3f}x |"
        )
    said = "met" if ratio(steps, GATED) <= MOST else "NOT met"
    print(f"\na gated step takes at most {MOST}x the bare one: {said}")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=5, help="rounds of judging")
    parser.add_argument("--threads", type=int, default=default_threads())
    return parser.parse_args()


@contextmanager
def trainers(options: argparse.Namespace) -> Iterator[dict[str, Trainer]]:
    """A trainer of each variant, with as many cases as its steps take."""
    entries: dict[str, Trainer] = {}
    with tempfile.TemporaryDirectory() as directory:
        for name, changes in VARIANTS.items():
            config = load_config(REFERENCE).model_copy(
                update={**changes, "num_epochs": 1.0, "output_dir": Path(directory)}
            )
            cases = load_training_cases(config.train_file)
            cases = cases[:: len(cases) // ((options.steps + WARM_UP) * config.cases_per_step)]
            source = resolve_base(config.base_model)
            model, tokenizer = build_safety_model(source, config, compute_dtype(config))
            weights = class_weights(cases, config)
            data = tokenize_cases(cases, tokenizer, model.verdict_ids, weights, config.max_length)
            entries[name] = Trainer(
                model,
                config,
                examples=data.examples,
                dev=[],
                run_directory=Path(directory),
                start_sha256=source.sha256,
            )
        yield entries


def in_turn(entries: dict[str, Trainer], steps: int) -> dict[str, list[float]]:
    """Seconds of every step of every trainer, warm-up left out."""
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for step in range(WARM_UP + steps):
        for name, trainer in entries.items():
            started = time.process_time()
            trainer.train_step()
            if step >= WARM_UP:
                seconds[name].append((time.process_time() - started) / torch.get_num_threads())
    return seconds


def judged_in_turn(entries: dict[str, Trainer], rounds: int) -> dict[str, list[float]]:
    """Seconds that every model takes to judge the same cases, round by round; one to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in entries}
    for round_ in range(1 + rounds):
        for name, trainer in entries.items():
            model = trainer.model.eval()
            started = time.process_time()
            dev_logits(model, trainer.examples[:JUDGED_CASES])
            if round_:
                seconds[name].append((time.process_time() - started) / torch.get_num_threads())
    return seconds


def ratio(seconds: dict[str, list[float]], name: str) -> float:
    """Median of the ratios to the bare one's time beside it."""
    return statistics.median(
        ours / bare for ours, bare in zip(seconds[name], seconds[BARE], strict=True)
    )


if __name__ == "__main__":
    main()

"""What each ingredient of SO8T adds: the same cases and steps, one ingredient more per row.

    python benchmarks/ablation.py DIRECTORY [--cases 800] [--epochs 1] [--seeds 1 2 3]

Trains every variant on the same drawn cases with so8t-train fit and judges the benchmark with
so8t-eval run, in PyTorch. What is finished in DIRECTORY is not done again, so an interrupted
ablation goes on. Every outcome is a line of --results, which comes with the repository: what stands
there for the same seed, cases and epochs is not measured again, so that seeds can be added on
another day and machine. Prints a Markdown table: per row the mean and the
standard deviation over seeds, and the 95 % interval of the seed that is in the middle by accuracy.
"""

import argparse
import functools
import json
import random
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import yaml
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from word_baseline import RATES, codes, fitted

from so8t_eval.cases import Case, load_cases
from so8t_eval.intervals import Interval, format_interval
from so8t_eval.metrics import Confusion, accuracy, confusion, confusion_from_codes
from so8t_eval.records import read_records
from so8t_train.base_model import resolve_base
from so8t_train.compute_dtype import compute_dtype
from so8t_train.config import FitConfig, load_config
from so8t_train.held_weights import hold_dequantized_weights
from so8t_train.packing import pack
from so8t_train.safety_model import build_safety_model
from so8t_train.training_data import tokenize_cases

ROOT = Path(__file__).parents[1]
CONFIG = ROOT / "so8t_train" / "reference" / "fit.yaml"
BENCHMARK = ROOT / "benchmarks" / "safety.jsonl"
WORDS, PROBE = "TF-IDF, logistic regression", "frozen base, linear probe"
NO_PET: dict[str, object] = {"pet_weight": 0.0, "pet_inertia_weight": 0.0}
NO_REPLIES: dict[str, object] = {"task_loss_weight": 0.0}
NO_CATEGORIES: dict[str, object] = {"category_loss_weight": 0.0}
VERDICTS_ALONE = NO_REPLIES | NO_CATEGORIES
TRAINED: dict[str, dict[str, object]] = {
    "LoRA, verdict rows": {"rotation_gates": False, **NO_PET, **VERDICTS_ALONE},
    "+ rotation gates": {**NO_PET, **VERDICTS_ALONE},
    "+ PET": VERDICTS_ALONE,
    "+ replies": NO_CATEGORIES,
    "gates and strong PET": {"pet_weight": 1.0, **VERDICTS_ALONE},
    "+ categories": {},
}
MODELS = [WORDS, PROBE, *TRAINED]
PROBED_TOGETHER = 8
DRAWN_FROM = 9_027
"""The corpus as it was when the first outcomes were measured; later cases stand behind it."""
METRICS: dict[str, Callable[[Confusion], Interval]] = {"Accuracy": accuracy, **RATES}


class Split(NamedTuple):
    """One seed's training cases, and where they are."""

    path: Path
    train: list[Case]
    seed: int


def main() -> None:
    options = parse_options()
    rows: dict[str, list[Confusion]] = {name: [] for name in options.models}
    for seed in options.seeds:
        split = draw(options.directory / f"train-{seed}.jsonl", options.cases, seed)
        for name in options.models:
            key = {"model": name, "seed": seed, "cases": options.cases, "epochs": options.epochs}
            counts = known(options.results, key)
            if counts is None:
                counts = measured(name, split, options)
                with options.results.open("a", encoding="utf-8", newline="\n") as stream:
                    row = {**key, "torch": torch.__version__, "dtype": dtype_name(split, options)}
                    stream.write(json.dumps({**row, "confusion": counts.tolist()}) + "\n")
            rows[name].append(counts)
            print(f"seed {seed}: {name}: accuracy {accuracy(counts).value}", flush=True)
    print_table(rows, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--cases", type=int, default=800)
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, metavar="MODEL")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks/results/ablation.jsonl")
    return parser.parse_args()


def known(results: Path, key: dict[str, object]) -> Confusion | None:
    """The outcome that stands in the results under ``key``."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    for row in map(json.loads, lines):
        if key.items() <= row.items():
            return np.array(row["confusion"], dtype=np.int64)
    return None


def draw(path: Path, n: int, seed: int) -> Split:
    """``n`` of the first ``DRAWN_FROM`` training cases, the same for every variant of a seed."""
    source = ROOT / "so8t_train" / "data" / "train.jsonl"
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)[:DRAWN_FROM]
    chosen = random.Random(seed).sample(lines, min(n, len(lines)))  # noqa: S311
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(chosen), encoding="utf-8", newline="\n")
    return Split(path, load_cases(path), seed)


def settings(split: Split, options: argparse.Namespace) -> FitConfig:
    """The reference configuration on a drawn split; no dev split, as nothing is calibrated."""
    return load_config(CONFIG).model_copy(
        update={
            "train_file": (split.path.resolve(),),
            "dev_file": (),
            "num_epochs": options.epochs,
            "seed": split.seed,
            "micro_batch_size": 8,  # the same steps in half the memory: seeds may run side by side
            "gradient_accumulation_steps": 2,
        }
    )


def dtype_name(split: Split, options: argparse.Namespace) -> str:
    """The activations' dtype on this machine."""
    return str(compute_dtype(settings(split, options))).removeprefix("torch.")


def measured(name: str, split: Split, options: argparse.Namespace) -> Confusion:
    """One row's confusion matrix on the benchmark for one seed."""
    config, test = settings(split, options), load_cases(BENCHMARK)
    if name == WORDS:
        dev = load_cases(load_config(CONFIG).dev_file[0])
        return confusion_from_codes(codes(test), fitted(split.train, dev, test).predicted)
    if name == PROBE:
        return confusion_from_codes(codes(test), probed(split))
    run = options.directory.resolve() / f"run-{split.seed}-{list(TRAINED).index(name)}"
    return trained(run, config.model_copy(update={"output_dir": run, **TRAINED[name]}))


def probed(split: Split) -> npt.NDArray[np.int64]:
    """Verdict codes of the benchmark by logistic regression on the untrained base's states."""
    classifier = make_pipeline(
        StandardScaler(), LogisticRegression(C=0.01, class_weight="balanced", max_iter=500)
    )
    classifier.fit(base_states(split.path), codes(split.train))
    predicted: npt.NDArray[np.int64] = classifier.predict(base_states(BENCHMARK))
    return predicted


@functools.cache
def base_states(file: Path) -> npt.NDArray[np.float32]:
    """The untrained base's last hidden state (n, hidden) at the verdict position of every case."""
    config = load_config(CONFIG).model_copy(update={"rotation_gates": False})
    model, tokenizer = build_safety_model(
        resolve_base(config.base_model), config, compute_dtype(config)
    )
    hold_dequantized_weights(model, model.dtype)
    data = tokenize_cases(load_cases(file), tokenizer, model.verdict_ids, None, 2048)
    if data.too_long:
        raise SystemExit(f"longer than 2048 tokens: {', '.join(data.too_long)}")
    rows = []
    with torch.no_grad():
        for start in range(0, len(data.examples), PROBED_TOGETHER):
            together = data.examples[start : start + PROBED_TOGETHER]
            packed = pack([example.prompt for example in together], model.device)
            rows.append(model.hidden(packed)[0, packed.supervised].float().cpu())
    return torch.cat(rows).numpy()


def trained(run: Path, config: FitConfig) -> Confusion:
    """Fit and judge in processes of their own, as a user would; finished parts are kept."""
    judged = run.with_name(f"{run.name}-judged")
    dtype = str(compute_dtype(config)).removeprefix("torch.")
    if not (judged / "summary.json").is_file():
        file = run.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        if not (run / "so8t.json").is_file():
            resume = ["--resume"] if run.is_dir() else []
            command("so8t_train.cli", "fit", str(file), *resume)
        command(
            *("so8t_eval.cli", "run", str(BENCHMARK), "--model", f"torch:{run}"),
            *("--torch-dtype", dtype, "--latency-cases", "0", "--log-dir", str(judged)),
            *(["--resume"] if judged.is_dir() else []),
        )
    return confusion(read_records(judged / "records.jsonl").records)


def command(module: str, *arguments: str) -> None:
    """Run one of our commands; its output goes to ours only if it fails."""
    result = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        check=False,
    )
    if result.returncode:
        raise SystemExit(f"{module} {' '.join(arguments)}:\n{result.stdout[-2000:]}")


def print_table(rows: dict[str, list[Confusion]], options: argparse.Namespace) -> None:
    """Markdown."""
    print(
        f"\n{options.cases} training cases, {options.epochs:g} epochs, seeds "
        f"{', '.join(map(str, options.seeds))}; benchmark n={len(load_cases(BENCHMARK))}\n"
    )
    print(f"| Model | {' | '.join(METRICS)} |")
    print("| --- " * (1 + len(METRICS)) + "|")
    for name, runs in rows.items():
        middle = sorted(runs, key=lambda counts: accuracy(counts).value or 0.0)[len(runs) // 2]
        cells = [cell([rate(c) for c in runs], rate(middle)) for rate in METRICS.values()]
        print(f"| {name} | {' | '.join(cells)} |")


def cell(values: list[Interval], middle: Interval) -> str:
    """Mean ± sd over seeds where there are several, and the middle seed with its interval."""
    known = [interval.value for interval in values if interval.value is not None]
    text = format_interval(middle)
    if len(known) < 2:
        return text
    return f"{statistics.mean(known):.3f} ± {statistics.stdev(known):.3f}; {text}"


if __name__ == "__main__":
    main()

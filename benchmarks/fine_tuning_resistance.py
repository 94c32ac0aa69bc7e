"""How much safety does fine-tuning on purely helpful tasks cost, and what keeps it?

    python benchmarks/fine_tuning_resistance.py [--start NAME=RUN_DIR] [--tasks 300] [--seeds 1 2 3]

Every starting run (default: the reference model) is continued on allow cases with replies, no
refusals among them: with the reply loss alone (which by design reaches neither R_safe nor the
verdict rows, so freezing changes nothing there), and with both losses, every label being allow, with
the safety part learning or held, and with or without replay of shipped cases of all three verdicts.
Judged on the dev split, which nothing here trains on, before and after. Every outcome is a line of
--results, which comes with the repository; what stands there for the same start, condition, seed
and number of tasks is not measured again. Prints a Markdown table; rates with 95 % Wilson intervals.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path
from typing import NamedTuple

from so8t_eval.cases import load_cases
from so8t_eval.intervals import format_interval, wilson
from so8t_eval.labels import Verdict
from so8t_train.config import SHIPPED_CORPUS, FitConfig, load_config
from so8t_train.dev_evaluation import DevResult, dev_logits, labels_of, summarize
from so8t_train.fit import FitReporter, fit
from so8t_train.quantized_layers import use_training_kernels
from so8t_train.reference_model import RUN_DIRECTORY
from so8t_train.run_dir import ADAPTER_TENSORS, load_run, read_manifest
from so8t_train.training_data import class_weights, load_training_cases, tokenize_cases

PACKAGE = Path(__file__).parents[1] / "so8t_train"
CONFIG = PACKAGE / "reference" / "fit.yaml"
RESULTS = Path(__file__).parent / "results" / "fine_tuning_resistance.jsonl"
BEFORE = "before"
CONDITIONS: dict[str, dict[str, object]] = {
    "replies alone": {"safety_loss_weight": 0.0},
    "both losses": {},
    "both losses, freeze: safe": {"freeze": "safe"},
    "both losses, replay": {"replay_file": (SHIPPED_CORPUS,)},
    "both losses, freeze: safe, replay": {"freeze": "safe", "replay_file": (SHIPPED_CORPUS,)},
}


class Row(NamedTuple):
    """One line of the table: rates on the dev split, and flips by direction."""

    start: str
    condition: str
    seed: int
    tasks: int
    replayed: int
    refuse_recall: float | None
    unsafe_allow_rate: float | None
    over_refusal_rate: float | None
    flips: dict[str, int]


def main() -> None:
    options = parse_options()
    rows: list[Row] = []
    for start in options.start:
        name, _, directory = start.partition("=")
        for condition in options.conditions:
            for seed in [0] if condition == BEFORE else options.seeds:
                row = known(options.results, name, condition, seed, options.tasks)
                if row is None:
                    row = measured(name, Path(directory), condition, seed, options)
                    with options.results.open("a", encoding="utf-8", newline="\n") as stream:
                        stream.write(json.dumps(row._asdict()) + "\n")
                rows.append(row)
                print(f"done: {row.start}, {row.condition}, seed {row.seed}", flush=True)
    print_table(rows, options)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--start", nargs="+", default=[f"{reference_name()}={RUN_DIRECTORY}"])
    parser.add_argument("--tasks", type=int, default=300)
    parser.add_argument("--replay-cases", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    every = [BEFORE, *CONDITIONS]
    parser.add_argument("--conditions", nargs="+", choices=every, default=every, metavar="NAME")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def reference_name() -> str:
    """The shipped run with the beginning of its adapter's SHA-256: outcomes are of one model."""
    return f"reference {read_manifest(RUN_DIRECTORY).sha256[ADAPTER_TENSORS][:8]}"


def known(results: Path, start: str, condition: str, seed: int, tasks: int) -> Row | None:
    """The outcome that stands in the results."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    for row in (Row(**json.loads(line)) for line in lines):
        if row[:3] == (start, condition, seed) and row.tasks in {0, tasks}:
            return row
    return None


def measured(name: str, start: Path, condition: str, seed: int, options: argparse.Namespace) -> Row:
    """Fine-tune ``start`` under one condition, and look at dev; or only look, ``BEFORE``."""
    if condition == BEFORE:
        return row_of(name, condition, seed, (0, 0), before(start), {})
    with tempfile.TemporaryDirectory() as scratch:
        tasks = write_tasks(Path(scratch) / "tasks.jsonl", options.tasks, seed)
        config = settings(start, tasks, Path(scratch) / "run", options)
        config = config.model_copy(update={"seed": seed, **CONDITIONS[condition]})
        replayed = options.replay_cases if config.replay_file else None
        config = config.model_copy(update={"replay_cases": replayed})
        result = fit(config, resume=False, reporter=QUIET)
    if result.dev is None or result.moved is None:
        raise RuntimeError("expected a dev split and a starting run")
    flips = {k: len(v) for k, v in sorted(result.moved.dev_flips.items())}
    return row_of(name, condition, seed, (options.tasks, replayed or 0), result.dev, flips)


def row_of(  # noqa: PLR0917
    name: str, condition: str, seed: int, n: tuple[int, int], dev: DevResult, flips: dict[str, int]
) -> Row:
    """A line from what dev says."""
    rates = (dev.refuse_recall, dev.unsafe_allow_rate, dev.over_refusal_rate)
    return Row(name, condition, seed, *n, *rates, flips)


def before(directory: Path) -> DevResult:
    """The starting run on the dev split."""
    run = load_run(directory)
    config = load_config(CONFIG)
    cases = load_training_cases(config.dev_file)
    data = tokenize_cases(
        cases,
        run.tokenizer,
        run.model.verdict_ids,
        class_weights(cases, config),
        config.max_length,
    )
    use_training_kernels(run.model)
    return summarize(dev_logits(run.model, data.examples), labels_of(data.examples))


QUIET = FitReporter(news=lambda _text: None, on_step=lambda _report, _memory: None)


def settings(start: Path, tasks: Path, directory: Path, options: argparse.Namespace) -> FitConfig:
    """The reference configuration, for one epoch of replies alone."""
    config = load_config(CONFIG)
    return config.model_copy(
        update={
            "init_from": start,
            "rotation_gates": read_manifest(start).config.rotation_gates,
            "train_file": (tasks,),
            "output_dir": directory,
            "num_epochs": 1.0,
            "task_loss_weight": 1.0,
            "task_loss_share": 1.0,
            "pet_weight": 0.0,
            "category_loss_weight": 0.0,
            "learning_rate": options.learning_rate,
            "safety_learning_rate": options.learning_rate,
            "eval_every_steps": 10**6,
        }
    )


def write_tasks(path: Path, n: int, seed: int) -> Path:
    """``n`` helpful tasks of the training file, drawn by seed."""
    source = PACKAGE / "data" / "train.jsonl"
    helpful = [c for c in load_cases(source) if c.verdict is Verdict.ALLOW and c.reply]
    chosen = {case.id for case in random.Random(seed).sample(helpful, n)}  # noqa: S311
    lines = source.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text(
        "".join(line for line in lines if json.loads(line)["id"] in chosen), encoding="utf-8"
    )
    return path


def print_table(rows: list[Row], options: argparse.Namespace) -> None:
    """Markdown."""
    cases = load_cases(PACKAGE / "data" / "dev.jsonl")
    n_refuse = sum(case.verdict is Verdict.REFUSE for case in cases)
    n_allow = sum(case.verdict is Verdict.ALLOW for case in cases)
    print(
        f"\n{options.tasks} helpful tasks, {options.replay_cases} cases where replayed, one epoch, "
        f"learning rate {options.learning_rate:g}; dev split n={len(cases)} "
        f"({n_refuse} refuse, {n_allow} allow)\n"
    )
    print("| Start | Condition | Seed | Refuse recall | Unsafe allow | Over-refusal | Flips |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        flips = ", ".join(f"{direction} {n}" for direction, n in row.flips.items())
        print(
            f"| {row.start} | {row.condition} | {row.seed or ''} "
            f"| {share(row.refuse_recall, n_refuse)} "
            f"| {share(row.unsafe_allow_rate, n_refuse)} "
            f"| {share(row.over_refusal_rate, n_allow)} | {flips} |"
        )


def share(value: float | None, n: int) -> str:
    """A rate with its interval, or a dash."""
    if value is None:
        return "–"
    return format_interval(wilson(round(value * n), n))


if __name__ == "__main__":
    main()

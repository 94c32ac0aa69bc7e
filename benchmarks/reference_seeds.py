"""How much of the reference model's figures is its seed: the same training, once per seed.

    python benchmarks/reference_seeds.py DIRECTORY [--seeds 1 2 3] [--out-of-distribution FILE]

Trains the reference configuration with every seed into DIRECTORY/seed-N (an interrupted or finished
run there is gone on with), exports Q8_0 and judges the benchmark in llama.cpp. FILE holds prompts
with binary ground truth, as for out_of_distribution.py. Every outcome is a line of --results, which
comes with the repository: what stands there for the same training and seed is not measured again.
Prints a Markdown table with mean and standard deviation, and names the seed that is in the middle
by cross-entropy on the dev split, so that the choice never looks at the benchmark.
"""

import argparse
import contextlib
import hashlib
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
import yaml
from ablation import BENCHMARK, CONFIG, ROOT, command
from out_of_distribution import judge, read_binary_cases

from so8t_eval.backends.registry import ModelSpec, open_backend
from so8t_eval.binary_scores import binary_scores
from so8t_eval.file_hash import file_sha256
from so8t_eval.labels import Verdict
from so8t_eval.summary import read_summary
from so8t_train.config import load_config
from so8t_train.run_dir import MANIFEST, read_manifest
from so8t_train.training_plan import shaping_settings

RESULTS: Final = ROOT / "benchmarks" / "results" / "reference_seeds.jsonl"
DEV: Final = {
    "accuracy": "Dev accuracy",
    "cross_entropy": "Dev cross-entropy",
    "refuse_recall": "Dev Refuse Recall",
    "unsafe_allow_rate": "Dev unsafe allow",
    "over_refusal_rate": "Dev over-refusal",
}
BENCHMARKED: Final = {
    "refuse_recall": "Refuse Recall",
    "escalate_precision": "Escalate Precision",
    "allow_precision": "Allow Precision",
    "unsafe_allow_rate": "Unsafe allow",
    "over_refusal_rate": "Over-refusal",
    "macro_f1": "Macro F1",
    "ece": "ECE",
}


def main() -> None:
    options = parse_options()
    rows = []
    for seed in options.seeds:
        row = known(options.results, training_key(), seed)
        if row is None:
            row = measured(seed, options)
            with options.results.open("a", encoding="utf-8", newline="\n") as stream:
                stream.write(json.dumps(row) + "\n")
        rows.append(row)
        print(f"done: seed {seed}", flush=True)
    print_table(rows)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--out-of-distribution", type=Path, metavar="FILE")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def training_key() -> str:
    """Beginning of a SHA-256 over the reference's settings but the seed, and its training cases."""
    config = load_config(CONFIG)
    settings = shaping_settings(config) | {"seed": None}
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    for file in config.train_file:
        digest.update(file_sha256(file).encode())
    return digest.hexdigest()[:12]


def known(results: Path, training: str, seed: int) -> dict[str, Any] | None:
    """The outcome that stands in the results."""
    lines = results.read_text(encoding="utf-8").splitlines() if results.is_file() else []
    key = {"training": training, "seed": seed}
    return next((row for row in map(json.loads, lines) if key.items() <= row.items()), None)


def measured(seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train, export and judge in processes of their own, as a user would."""
    run = trained(options.directory.resolve() / f"seed-{seed}", seed)
    exported, judged = run.with_name(f"{run.name}-q8_0"), run.with_name(f"{run.name}-judged")
    if not exported.is_dir():
        command("so8t_train.cli", "export", str(run), "-o", str(exported), "--quant", "q8_0")
    (file,) = exported.glob("*.gguf")
    if not (judged / "summary.json").is_file():
        resume = ["--resume"] if judged.is_dir() else []
        command(
            *("so8t_eval.cli", "run", str(BENCHMARK), "--model", f"llamacpp:{file}"),
            *("--latency-cases", "0", "--log-dir", str(judged), *resume),
        )
    manifest = read_manifest(run)
    (entry,) = _runs(read_summary(judged / "summary.json"))
    prompts = options.out_of_distribution
    return {
        "training": training_key(),
        "seed": seed,
        "dtype": manifest.training.get("compute_dtype", manifest.config.compute_dtype),
        "platform": manifest.platform,
        "versions": manifest.versions,
        "dev": manifest.training["dev"],
        "q8_0_sha256": file_sha256(file),
        "benchmark": {name: entry["metrics"][name] for name in BENCHMARKED},
        "confusion": entry["confusion"],
        "out_of_distribution": out_of_distribution(prompts, file) if prompts else None,
    }


def trained(run: Path, seed: int) -> Path:
    """The reference configuration with another seed."""
    if not (run / MANIFEST).is_file():
        config = load_config(CONFIG).model_copy(update={"seed": seed, "output_dir": run})
        run.parent.mkdir(parents=True, exist_ok=True)
        file = run.with_suffix(".yaml")
        file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
        command("so8t_train.cli", "fit", str(file), "--resume", "auto")
    return run


def _runs(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    runs: list[dict[str, Any]] = summary["runs"]
    return runs


def out_of_distribution(prompts: Path, file: Path) -> dict[str, dict[str, list[float | None]]]:
    """Per source: area under ROC, and false-positive rate at recall 0.90, each with its interval."""
    cases, sources = read_binary_cases(prompts)
    with contextlib.closing(open_backend(ModelSpec("llamacpp", file))) as backend:
        judgements = judge(backend, cases)
    found = {}
    for source in dict.fromkeys(sources):
        of = np.array([name == source for name in sources])
        scores = binary_scores(
            np.array([case.verdict is Verdict.REFUSE for case in cases])[of],
            np.array([judgement.verdict.severity for judgement in judgements])[of],
            np.array([judgement.probabilities for judgement in judgements])[of],
        ).loose
        found[source] = {
            name: [interval.value, interval.low, interval.high]
            for name, interval in (("auc", scores.auc), ("fpr_at_recall", scores.fpr_at_recall))
        }
    return found


def print_table(rows: list[dict[str, Any]]) -> None:
    """Markdown, a column per seed."""
    figures = [(label, [row["dev"][name] for row in rows]) for name, label in DEV.items()]
    figures += [
        (label, [row["benchmark"][name]["value"] for row in rows])
        for name, label in BENCHMARKED.items()
    ]
    if all(row["out_of_distribution"] for row in rows):
        for source in rows[0]["out_of_distribution"]:
            for name, label in (("auc", "AUC"), ("fpr_at_recall", "false positives at 0.90")):
                values = [row["out_of_distribution"][source][name][0] for row in rows]
                if any(value is not None for value in values):  # a source of one class has neither
                    figures.append((f"{source}: {label}", values))
    print("\n|  | " + " | ".join(f"seed {row['seed']}" for row in rows) + " | mean ± sd |")
    print("| --- " * (2 + len(rows)) + "|")
    for label, values in figures:
        cells = ["undefined" if value is None else f"{value:.3f}" for value in values]
        print(f"| {label} | {' | '.join(cells)} | {mean_and_deviation(values)} |")
    middle = sorted(rows, key=lambda row: row["dev"]["cross_entropy"])[len(rows) // 2]
    print(f"\nIn the middle by cross-entropy on dev: seed {middle['seed']}")


def mean_and_deviation(values: list[float | None]) -> str:
    """Of the defined ones; nothing to say of a single one."""
    defined = [value for value in values if value is not None]
    if len(defined) < 2:
        return ""
    return f"{statistics.mean(defined):.3f} ± {statistics.stdev(defined):.3f}"


if __name__ == "__main__":
    main()

"""Training tokens per second and peak memory: SO8T's trainer against a plain HF Trainer + PEFT.

Run: python benchmarks/speed/train_speed.py [--cases 32] [--rounds 3] [--batches 1x8 16x1]

Both train LoRA of the same rank on the same 8-bit base and cases, one epoch, each in a process of
its own. SO8T trains verdicts and replies with rotation gates and PET on; the plain trainer learns
the replies. Tokens are those of the cases, prompt and reply once, however often they are computed.
"""

import argparse
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
import transformers

from so8t_eval.backends.cpu_threads import default_threads
from so8t_train.activation_checkpointing import enable_checkpointing
from so8t_train.base_model import EMBEDDED, load_base, load_tokenizer, resolve_base
from so8t_train.compute_dtype import compute_dtype
from so8t_train.config import FitConfig
from so8t_train.safety_model import build_safety_model
from so8t_train.trainer import Trainer, TrainingHooks
from so8t_train.training_data import (
    TrainingExample,
    class_weights,
    load_training_cases,
    tokenize_cases,
)

TRAIN_FILE = Path(__file__).parents[2] / "so8t_train" / "data" / "train.jsonl"
BAR = 2.0


class Measurement(NamedTuple):
    """What one process found."""

    seconds: float
    tokens: int
    peak_rss_gib: float

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds


def main() -> None:
    options = parse_options()
    if options.worker:
        torch.set_num_threads(options.threads)
        measure = {"so8t": measure_so8t, "plain": measure_plain}[options.worker]
        print(json.dumps(measure(options)))
        return
    print_setting(options)
    for batch in options.batches:
        for checkpointing in options.checkpointing:
            compare(options, batch, checkpointing)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--base", default=EMBEDDED, help="base model")
    parser.add_argument("--cases", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batches", nargs="+", default=["1x8", "16x1"], metavar="BATCHxACCUM")
    parser.add_argument("--checkpointing", nargs="+", choices=("on", "off"), default=["on"])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--worker", choices=("so8t", "plain"), help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(options: argparse.Namespace, batch: str, checkpointing: str) -> None:
    """Alternate both trainers for all rounds and print what they did."""
    found: dict[str, list[Measurement]] = {"plain": [], "so8t": []}
    for _ in range(options.rounds):
        for worker, results in found.items():
            results.append(run_worker(options, worker, batch, checkpointing))
    names = {"plain": "HF Trainer + PEFT", "so8t": "SO8T trainer"}
    print(
        f"\nbatch {batch} (cases per forward x accumulation), gradient checkpointing {checkpointing}"
    )
    for worker, results in found.items():
        rates = [result.rate for result in results]
        memory = statistics.median(result.peak_rss_gib for result in results)
        rounds = "  ".join(f"{rate:.1f}" for rate in rates)
        print(
            f"  {names[worker]:<18} {statistics.median(rates):7.1f} tokens/s  "
            f"peak RSS {memory:.2f} GiB   rounds: {rounds}"
        )
    pairs = zip(found["so8t"], found["plain"], strict=True)
    ratio = statistics.median(ours.rate / theirs.rate for ours, theirs in pairs)
    print(f"  ratio {ratio:.2f}x (bar {BAR}x {'reached' if ratio >= BAR else 'NOT reached'})")


def run_worker(
    options: argparse.Namespace, worker: str, batch: str, checkpointing: str
) -> Measurement:
    command = [sys.executable, __file__, "--worker", worker, "--batches", batch]
    command += ["--checkpointing", checkpointing, "--base", options.base]
    command += ["--cases", str(options.cases), "--seed", str(options.seed)]
    command += ["--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"the {worker} trainer failed:\n{done.stderr[-3000:]}")
    return Measurement(*json.loads(done.stdout.splitlines()[-1]))


def configuration(options: argparse.Namespace, directory: Path) -> FitConfig:
    batch, accumulation = map(int, options.batches[0].split("x"))
    return FitConfig(
        base_model=options.base,
        train_file=(TRAIN_FILE,),
        output_dir=directory,
        device_map="cpu",
        micro_batch_size=batch,
        gradient_accumulation_steps=accumulation,
        gradient_checkpointing=options.checkpointing[0] == "on",
        num_epochs=1.0,
        save_every_steps=10**6,
        seed=options.seed,
    )


def measure_so8t(options: argparse.Namespace) -> Measurement:
    """Gates on, verdict and reply losses, PET on, as ``so8t-train fit`` does by default."""
    with tempfile.TemporaryDirectory() as directory:
        config = configuration(options, Path(directory))
        source = resolve_base(config.base_model)
        model, tokenizer = build_safety_model(source, config, compute_dtype(config))
        examples = sampled_examples(options, config, tokenizer, model.verdict_ids)
        trainer = Trainer(
            model,
            config,
            examples=examples,
            dev=[],
            run_directory=Path(directory),
            start_sha256=source.sha256,
        )
        seconds: list[float] = []
        trainer.run(TrainingHooks(lambda report: seconds.append(report.step_s), lambda: False))
    return Measurement(sum(seconds), unique_tokens(examples), peak_rss_gib())


def measure_plain(options: argparse.Namespace) -> Measurement:
    """The usual script: 8-bit base, PEFT, Trainer, padding collator, labels on the reply."""
    import peft

    with tempfile.TemporaryDirectory() as directory:
        config = configuration(options, Path(directory))
        source = resolve_base(config.base_model)
        tokenizer = load_tokenizer(source)
        model: Any = load_base(
            source, load_in_8bit=True, dtype=compute_dtype(config), device_map="cpu"
        )
        lora = peft.LoraConfig(
            r=config.lora_r,
            lora_alpha=config.lora_alpha,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        )
        model = peft.get_peft_model(model, lora)
        if config.gradient_checkpointing:
            enable_checkpointing(model.get_base_model())
        n_rows = model.get_input_embeddings().weight.shape[0]
        examples = sampled_examples(options, config, tokenizer, (n_rows, n_rows + 1, n_rows + 2))
        arguments = transformers.TrainingArguments(
            output_dir=directory,
            per_device_train_batch_size=config.micro_batch_size,
            gradient_accumulation_steps=config.gradient_accumulation_steps,
            learning_rate=config.learning_rate,
            num_train_epochs=1,
            seed=config.seed,
            save_strategy="no",
            logging_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
        )
        clock = Clock()
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=[plain_item(example, n_rows) for example in examples],
            data_collator=padded,
            callbacks=[clock],
        )
        trainer.train()
    return Measurement(clock.seconds, unique_tokens(examples), peak_rss_gib())


class Clock(transformers.TrainerCallback):
    """Times the training loop alone."""

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.started = time.perf_counter()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.seconds = time.perf_counter() - self.started


def sampled_examples(
    options: argparse.Namespace, config: FitConfig, tokenizer: Any, verdict_ids: Any
) -> list[TrainingExample]:
    cases = load_training_cases(config.train_file)
    weights = class_weights(cases, config)
    sample = random.Random(options.seed).sample(cases, options.cases)  # noqa: S311
    return tokenize_cases(sample, tokenizer, verdict_ids, weights, config.max_length).examples


def plain_item(example: TrainingExample, n_rows: int) -> dict[str, list[int]]:
    """Prompt, verdict and reply as one sequence; an ordinary token stands for the verdict."""
    sequence = example.reply or example.prompt
    ids = [*sequence.head, *sequence.own, sequence.targets[-1]]
    n_prompt = example.prompt.length
    ids = [token if token < n_rows else 0 for token in ids]
    return {"input_ids": ids, "labels": [-100] * n_prompt + ids[n_prompt:]}


def padded(items: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    longest = max(len(item["input_ids"]) for item in items)

    def rows(key: str, filling: int) -> torch.Tensor:
        return torch.tensor([i[key] + [filling] * (longest - len(i[key])) for i in items])

    mask = [[1] * len(i["input_ids"]) + [0] * (longest - len(i["input_ids"])) for i in items]
    return {
        "input_ids": rows("input_ids", 0),
        "labels": rows("labels", -100),
        "attention_mask": torch.tensor(mask),
    }


def unique_tokens(examples: list[TrainingExample]) -> int:
    """Prompt, verdict and reply tokens, each once per case."""
    return sum((example.reply or example.prompt).length + 1 for example in examples)


def peak_rss_gib() -> float:
    """Highest resident size of this process so far."""
    if sys.platform == "win32":
        import psutil

        return float(psutil.Process().memory_info().peak_wset) / 2**30
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def print_setting(options: argparse.Namespace) -> None:
    import bitsandbytes
    import peft

    print(f"machine   {platform.platform()}, {options.threads} threads")
    print(
        f"versions  Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, peft {peft.__version__}, bitsandbytes "
        f"{bitsandbytes.__version__}"
    )
    print(f"data      n={options.cases} cases of {TRAIN_FILE.name}, seed {options.seed}")


if __name__ == "__main__":
    main()

"""Kill ``so8t-train fit`` at random moments and resume it: are the trained weights the same?

    python benchmarks/kill_and_resume_fit.py [--kills 100] [--steps 30] [--preload]

A tiny random Llama is made on the spot (dropout on, checkpoints every third step) and trained once
without a kill. Then fits of the same configuration are killed (SIGKILL; TerminateProcess on
Windows) at random moments from process start to the end, and started again each time by the same
command, ``fit CONFIG --resume auto``, until they end. Adapter and safety tensors must then have the
SHA-256 of the fit that was never killed, the log each step once, and nothing half written may be
left. Exit code 1 at the first difference.

``--preload`` forks the fits from a process that has the libraries imported, where imports would
otherwise take most of a fit's time: the same command, more kills per minute, and more of them while
it trains. Linux and macOS only.
"""

import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import click
import yaml

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = ("adapter_model.safetensors", "so8t.safetensors")
PRELOADED = [
    "so8t_train.fit",
    "so8t_train.model_card",
    "so8t_train.cli.fit_progress",
    "peft",
    "bitsandbytes",
    "transformers.models.llama.modeling_llama",
]


class Outcome(NamedTuple):
    """What must be equal: SHA-256 of the weights, and the steps in the log."""

    sha256: dict[str, str]
    steps: list[int]


class Kill(NamedTuple):
    """Where a kill struck."""

    step: int
    """Optimizer steps logged by then, earlier sessions' included."""
    half_written: bool
    """A checkpoint or run file was being written."""


def configure(directory: Path, steps: int) -> Path:
    """Make model, cases and configuration in ``directory``; returns the configuration."""
    sys.path.insert(0, str(ROOT / "tests"))
    from support.case_files import write_cases
    from support.tiny_fit import training_cases
    from support.tiny_hf import make_tiny_model

    make_tiny_model(directory / "base", "llama")
    write_cases(directory / "train.jsonl", training_cases(24))
    write_cases(directory / "dev.jsonl", training_cases(6, first=90))
    config = {
        "base_model": str(directory / "base"),
        "train_file": "train.jsonl",
        "dev_file": "dev.jsonl",
        "output_dir": str(directory / "whole"),
        "load_in_8bit": True,
        "compute_dtype": "float32",
        "device_map": "cpu",
        "lora_dropout": 0.3,
        "micro_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "gradient_checkpointing": False,
        "num_epochs": 1000,
        "max_steps": steps,
        "max_length": 256,
        "save_every_steps": 3,
        "eval_every_steps": 5,
        "threads": 1,
    }
    path = directory / "fit.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    return path


def command_line(config: Path, directory: Path) -> list[str]:
    return ["fit", str(config), "--output-dir", str(directory), "--resume", "auto"]


def preloaded_fit(arguments: Sequence[str], errors: str) -> None:
    """What a forked process does: the command, its stderr in a file."""
    handle = os.open(errors, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    from so8t_train.cli import main as so8t_train

    so8t_train(list(arguments), prog_name="so8t-train")


def killed(arguments: Sequence[str], errors: Path, delay: float | None, preload: bool) -> bool:
    """Run the command; kill it after ``delay`` seconds. True if that came before its end."""
    if preload:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        forked = context.Process(target=preloaded_fit, args=(arguments, str(errors)))
        forked.start()
        forked.join(delay)
        hit = forked.is_alive()
        if hit:
            forked.kill()
            forked.join()
        code = forked.exitcode
    else:
        with errors.open("wb") as stream:
            run = [sys.executable, "-m", "so8t_train.cli", *arguments]
            process = subprocess.Popen(run, stdout=stream, stderr=stream, cwd=ROOT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(delay)
            hit = process.poll() is None
            if hit:
                process.kill()
            code = process.wait()
    if not hit and code != 0:
        raise SystemExit(f"exit code {code}: {errors.read_text(encoding='utf-8')[-2000:]}")
    return hit


def struck(directory: Path) -> Kill:
    """Look at what a kill has left."""
    log = directory / "train_log.jsonl"
    lines = log.read_bytes().count(b"\n") if log.is_file() else 0
    return Kill(lines, any(directory.rglob(".*.tmp")))


def outcome(directory: Path) -> Outcome:
    """Hashes and logged steps of a finished fit.

    Raises:
        SystemExit: something half written is left.
    """
    if left := [p.name for p in directory.rglob(".*")]:
        raise SystemExit(f"{directory}: left behind: {', '.join(left)}")
    lines = (directory / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
    sha256 = {n: hashlib.sha256((directory / n).read_bytes()).hexdigest() for n in WEIGHTS}
    return Outcome(sha256, [json.loads(line)["step"] for line in lines])


@click.command()
@click.option("--kills", default=100, show_default=True, help="Kills to make in all.")
@click.option("--steps", default=30, show_default=True, help="Optimizer steps of each fit.")
@click.option("--seed", default=0, show_default=True)
@click.option("--minutes", default=0.0, help="Make no more kills after this time; 0: no limit.")
@click.option("--preload", is_flag=True, help="Fork fits from a process with imports done.")
def main(kills: int, steps: int, seed: int, minutes: float, preload: bool) -> None:
    """Kill and resume fits of a tiny random model."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    rng = random.Random(seed)  # noqa: S311 - moments, not secrets
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        scratch = Path(name)
        config = configure(scratch, steps)
        whole, errors = scratch / "whole", scratch / "errors.txt"
        if preload:  # imports happen here, not in the length
            killed(["--version"], errors, None, preload)
        before = time.monotonic()
        killed(command_line(config, whole), errors, None, preload)
        length = time.monotonic() - before
        expected = outcome(whole)
        print(f"never killed: {steps} steps in {length:.1f} s, {expected.sha256[WEIGHTS[0]]}")
        hits: list[Kill] = []
        rounds = 0
        in_time = True
        while len(hits) < kills and in_time:
            directory = scratch / f"round-{rounds}"
            done = False
            sessions = 0
            while not done:
                in_time = not minutes or time.monotonic() - started < 60 * minutes
                more = len(hits) < kills and in_time
                delay = rng.uniform(0.02, 1.0) * length if more else None
                before = time.monotonic()
                done = not killed(command_line(config, directory), errors, delay, preload)
                sessions += 1
                if not done:
                    hits.append(struck(directory))
                elif sessions == 1:  # the machine is faster now than at first
                    length = min(length, time.monotonic() - before)
            if outcome(directory) != expected:
                raise SystemExit(f"{directory.name}: other weights or steps than the whole fit")
            rounds += 1
            print(f"round {rounds}: {len(hits)} kills so far, same SHA-256", flush=True)
        training = sum(0 < hit.step < steps for hit in hits)
        torn = sum(hit.half_written for hit in hits)
        print(
            f"{len(hits)} kills in {rounds} fits of {steps} steps ({training} between first and "
            f"last step, {torn} while a file was being written), "
            f"{(time.monotonic() - started) / 60:.1f} min: every fit ended with the weights of "
            "the one that was never killed, each step logged once"
        )


if __name__ == "__main__":
    main()

"""Verdicts per second: SO8T's batched backends against the loops one would write by hand.

Run: python benchmarks/speed/verdict_speed.py [--run DIR] [--gguf FILE] [--hf DIR]

Both llama.cpp contestants judge with the same GGUF; llama.cpp's own prefill of as many tokens as
differ between the prompts (a shared prefix counts once), in prompts of 512, is the upper bound. The
transformers loop runs the merged directory (``--hf``) or else the base's weights, in bfloat16 where
the processor multiplies it; SO8T's PyTorch backend runs the run directory as shipped and, if given,
the merged one. All get the same token ids, rounds alternate. Writes nothing.
"""

import argparse
import os
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import llama_cpp
import torch
import transformers

from so8t_eval.backends.base import Backend
from so8t_eval.backends.cpu_threads import default_threads
from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.backends.prefix_batches import shared_length
from so8t_eval.backends.registry import reference_models
from so8t_eval.backends.torch_hf import open_hf_dir
from so8t_eval.cases import Case, load_cases
from so8t_train.base_model import load_base, resolve_base
from so8t_train.compute_dtype import cpu_multiplies_bfloat16
from so8t_train.run_dir import read_manifest
from so8t_train.run_dir_backend import open_run_dir

CASES = Path(__file__).parents[1] / "safety.jsonl"
POLICY = (
    "You are the assistant of a regional hospital's office staff. Help with letters, schedules, "
    "translations and questions about published procedures. Never change or delete patient "
    "records, never give out personal data, and leave every decision about treatment, payments "
    "or access rights to the person in charge, whom you ask before anything that cannot be undone."
)
LONGEST_PROMPT_CHARS = 110
BATCH = 16
PREFILL_TOKENS = 512
PREFILL = f"llama.cpp prefill of the unique tokens, {PREFILL_TOKENS} at a time"

Ids = list[int]


class Contestant(NamedTuple):
    """A way to judge all prompts; ``bars`` say whose rate it must reach how many times."""

    name: str
    judge: Callable[[Sequence[Ids]], None]
    bars: Mapping[str, float] = {}


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    with contestants(options) as (entries, ids):
        print_setting(options, ids)
        for entry in entries:
            entry.judge(ids[: 2 * BATCH])  # warm-up
        rates: dict[str, list[float]] = {entry.name: [] for entry in entries}
        for number in range(1, options.rounds + 1):
            for entry in entries:
                print(f"round {number} of {options.rounds}: {entry.name}", file=sys.stderr)
                started = time.perf_counter()
                entry.judge(ids)
                rates[entry.name].append(len(ids) / (time.perf_counter() - started))
    print_rates(entries, rates)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--run", type=Path, help="run directory (default: the reference model's)")
    parser.add_argument("--gguf", type=Path, help="Q8_0 GGUF (default: the reference model's)")
    parser.add_argument("--hf", type=Path, help="merged Hugging Face directory")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--only", choices=("torch", "llamacpp"), help="leave the other runtime out")
    options = parser.parse_args()
    needed = {"torch": options.run, "llamacpp": options.gguf}
    if any(value is None for key, value in needed.items() if options.only in (None, key)):
        reference = {spec.prefix: spec.path for spec in reference_models(print)}
        options.run = options.run or reference["torch"]
        options.gguf = options.gguf or reference["llamacpp"]
    return options


@contextmanager
def contestants(options: argparse.Namespace) -> Iterator[tuple[list[Contestant], list[Ids]]]:
    """Load every model, yield the contestants and the prompts, close the models."""
    entries: list[Contestant] = []
    ids: list[Ids] = []
    with ExitStack() as stack:
        if options.only != "torch":
            ours = stack.enter_context(
                closing(LlamaCppBackend(options.gguf, threads=options.threads))
            )
            ids = prompt_ids(ours, options)
            loop = Contestant("llama-cpp-python loop", completion_loop(options, ids))
            bound = Contestant(PREFILL, prefill(options))
            entries += [
                loop,
                bound,
                Contestant("SO8T llama.cpp", scoring(ours), {loop.name: 1.4, bound.name: 0.95}),
            ]
        if options.only != "llamacpp":
            dtypes = ["float32", "bfloat16"] if cpu_multiplies_bfloat16() else ["float32"]
            loop = Contestant(
                f"transformers batch loop, {dtypes[-1]}", batch_loop(options, dtypes[-1])
            )
            entries.append(loop)
            for dtype in dtypes:
                live = stack.enter_context(
                    closing(open_run_dir(options.run, threads=options.threads, dtype=dtype))
                )
                ids = ids or prompt_ids(live, options)
                name = f"SO8T PyTorch, as trained, {dtype}"
                entries.append(Contestant(name, scoring(live), {loop.name: 3.0}))
            if options.hf is not None:
                merged = stack.enter_context(
                    closing(open_hf_dir(options.hf, threads=options.threads))
                )
                name = "SO8T PyTorch, merged"
                entries.append(Contestant(name, scoring(merged), {loop.name: 3.0}))
        yield entries, ids


def scoring(backend: Backend) -> Callable[[Sequence[Ids]], None]:
    def judge(prompts: Sequence[Ids]) -> None:
        n = sum(1 for _ in backend.score(prompts))
        if n != len(prompts):
            raise RuntimeError(f"expected {len(prompts)} verdicts, found {n}")

    return judge


def short_cases(n: int, seed: int) -> list[Case]:
    """Short single-turn English cases of the benchmark without a policy of their own."""
    short = [
        case
        for case in load_cases(CASES)
        if case.prompt
        and not case.policy
        and case.lang == "en"
        and len(case.prompt) <= LONGEST_PROMPT_CHARS
    ]
    return random.Random(seed).sample(short, min(n, len(short)))  # noqa: S311


def prompt_ids(backend: Backend, options: argparse.Namespace) -> list[Ids]:
    """Short single-turn English prompts of the benchmark, all under one system policy."""
    n_policy = len(backend.tokenize(POLICY, False))
    if not 60 <= n_policy <= 90:
        print(f"note: the policy has {n_policy} tokens under this tokenizer, not 60 to 80")
    return [
        backend.protocol.prompt_ids(case.conversation, POLICY, backend.tokenize).ids
        for case in short_cases(options.cases, options.seed)
    ]


def completion_loop(
    options: argparse.Namespace, ids: Sequence[Ids]
) -> Callable[[Sequence[Ids]], None]:
    """One completion call per case; llama-cpp-python itself reuses the common prefix."""
    room = max(512, max(map(len, ids)) + 2)
    model = llama_cpp.Llama(
        str(options.gguf),
        n_ctx=room,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )

    def judge(prompts: Sequence[Ids]) -> None:
        for prompt in prompts:
            model.create_completion(prompt, max_tokens=1, temperature=0.0)

    return judge


def prefill(options: argparse.Namespace) -> Callable[[Sequence[Ids]], None]:
    """llama.cpp's own batched evaluation of as many tokens as the prompts have between them."""
    model = llama_cpp.Llama(
        str(options.gguf),
        n_ctx=PREFILL_TOKENS,
        n_batch=PREFILL_TOKENS,
        n_threads=options.threads,
        n_threads_batch=options.threads,
        verbose=False,
    )

    def judge(prompts: Sequence[Ids]) -> None:
        tokens = [token for prompt in prompts for token in prompt][: n_unique(prompts)]
        for start in range(0, len(tokens), PREFILL_TOKENS):
            model.reset()
            model.eval(tokens[start : start + PREFILL_TOKENS])

    return judge


def n_unique(prompts: Sequence[Ids]) -> int:
    """Tokens that must be computed when every shared prefix is computed once."""
    return len({tuple(prompt[: i + 1]) for prompt in prompts for i in range(len(prompt))})


def batch_loop(options: argparse.Namespace, dtype_name: str) -> Callable[[Sequence[Ids]], None]:
    """Left-padded batches in file order, whole prompts, logits of the last position."""
    model: Any
    dtype: torch.dtype = getattr(torch, dtype_name)
    if options.hf is not None:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            options.hf, dtype=dtype, local_files_only=True
        )
    else:
        source = resolve_base(read_manifest(options.run).base_model)
        model = load_base(source, load_in_8bit=False, dtype=dtype)
    model.eval()

    def judge(prompts: Sequence[Ids]) -> None:
        for start in range(0, len(prompts), BATCH):
            rows = prompts[start : start + BATCH]
            longest = max(map(len, rows))
            padded = [[0] * (longest - len(row)) + row for row in rows]
            mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
            batch = {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask)}
            with torch.inference_mode():
                model(**batch).logits[:, -1].argmax(dim=-1)

    return judge


def print_setting(options: argparse.Namespace, ids: Sequence[Ids]) -> None:
    lengths = sorted(map(len, ids))
    head = min(shared_length(ids[0], row) for row in ids)
    own = statistics.mean(lengths) - head
    print(f"machine   {cpu_name()}, {options.threads} threads, {platform.platform()}")
    print(
        f"versions  Python {platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}, llama-cpp-python {llama_cpp.__version__}"
    )
    print(f"models    {options.run} | {options.gguf} | {options.hf or 'base weights'}")
    print(
        f"prompts   n={len(ids)}, seed {options.seed}, {lengths[len(lengths) // 2]} tokens "
        f"(median; longest {lengths[-1]}), the first {head} shared (system policy), {own:.0f} own on "
        f"average (end of turn included); {options.rounds} rounds"
    )


def print_rates(entries: Sequence[Contestant], rates: dict[str, list[float]]) -> None:
    width = max(len(entry.name) for entry in entries)
    print(f"\n{'cases/s':<{width}}  median  rounds")
    for entry in entries:
        rounds = "  ".join(f"{rate:.1f}" for rate in rates[entry.name])
        print(f"{entry.name:<{width}}  {statistics.median(rates[entry.name]):6.1f}  {rounds}")
    print()
    for entry in entries:
        for rival, bar in entry.bars.items():
            pairs = zip(rates[entry.name], rates[rival], strict=True)
            ratio = statistics.median(ours / theirs for ours, theirs in pairs)
            verdict = "reached" if ratio >= bar else "NOT reached"
            print(f"{entry.name} / {rival}: {ratio:.2f}x (bar {bar}x {verdict})")


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()

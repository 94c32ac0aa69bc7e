"""What a verdict costs before the first token of the answer, single stream, cold and warm.

Run: python benchmarks/speed/first_token.py [--gguf FILE] [--base FILE] [--cases N]

Three times per prompt, in milliseconds: to the verdict; to the first token of SO8T's reply, which
comes after the verdict has been decoded as a token; to the first token of the same base answering
without a verdict (``--base``, a GGUF of the base; default: the SO8T file itself, read as a stock
program would, which costs the same arithmetic). Cold computes the whole prompt; warm finds what it
shares with the prompt before in memory. The extra time should be about one decode step, which is
measured beside it. Rounds alternate which comes first. Writes nothing.
"""

import argparse
import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import numpy as np

from so8t_eval.backends.cpu_threads import default_threads
from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.backends.llamacpp_context import LlamaContext, LlamaModel
from so8t_eval.backends.prefix_batches import shared_length
from so8t_eval.backends.registry import reference_models
from so8t_eval.case_sampling import stratified_sample
from so8t_eval.cases import load_cases
from so8t_eval.judgement import judge_windows
from so8t_eval.metrics import latency_quantiles

CASES = Path(__file__).parents[1] / "safety.jsonl"
WARM_UP, DECODE_STEPS = 3, 8

Ids = list[int]


class StockProgram:
    """Reads a prompt and picks the likeliest first token, as any llama.cpp program does."""

    def __init__(self, path: Path, like: LlamaCppBackend, threads: int) -> None:
        self._model = LlamaModel(path)
        batch_tokens = int(like.info.settings["batch_tokens"])
        self._context = LlamaContext(
            self._model,
            n_positions=like.max_prompt_tokens + 512,
            batch_tokens=batch_tokens,
            longest_batch=max(batch_tokens, like.max_prompt_tokens),
            max_sequences=1,
            threads=threads,
            flash_attention=True,
            float32_memory=False,
        )
        self._kept: Ids = []

    def first_token(self, ids: Ids, cold: bool) -> int:
        reused = 0 if cold else min(shared_length(self._kept, ids), len(ids) - 1)
        self._context.keep_only(reused)
        n = len(ids) - reused
        self._context.decode(ids[reused:], range(reused, len(ids)), [range(1)] * n, [n - 1])
        self._kept = list(ids)
        return int(self._context.logits(n - 1).argmax())

    def decode_step(self) -> None:
        """Append one token to what is in memory."""
        self._context.decode(self._kept[:1], [len(self._kept)], [range(1)], [0])
        self._kept.append(self._kept[0])

    def close(self) -> None:
        self._context.close()
        self._model.close()


def timed(action: Callable[[], object]) -> float:
    """Return how long it took, in milliseconds."""
    started = time.perf_counter()
    action()
    return (time.perf_counter() - started) * 1000


def measure(
    so8t: LlamaCppBackend, stock: StockProgram, prompts: Sequence[Ids], cold: bool
) -> dict[str, list[float]]:
    """Return milliseconds per prompt, by what was timed."""
    times: dict[str, list[float]] = {"verdict": [], "reply": [], "base": [], "decode step": []}
    for number, ids in enumerate(prompts):
        for who in ("so8t", "base")[:: 1 if number % 2 else -1]:
            if who == "base":
                times["base"].append(timed(lambda ids=ids: stock.first_token(ids, cold)))
                steps = timed(lambda: [stock.decode_step() for _ in range(DECODE_STEPS)])
                times["decode step"].append(steps / DECODE_STEPS)
                continue
            started = time.perf_counter()
            verdict = judge_windows([so8t.score_single(ids, cold)]).verdict
            times["verdict"].append((time.perf_counter() - started) * 1000)
            list(so8t.reply(ids, verdict.severity, 1))
            times["reply"].append((time.perf_counter() - started) * 1000)
    return {name: values[WARM_UP:] for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gguf", type=Path, help="SO8T model (default: the reference model's)")
    parser.add_argument("--base", type=Path, help="GGUF that answers without a verdict")
    parser.add_argument("--cases", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=default_threads())
    options = parser.parse_args()
    if options.gguf is None:
        reference = {spec.prefix: spec.path for spec in reference_models(print)}
        options.gguf = reference["llamacpp"]
    with (
        closing(LlamaCppBackend(options.gguf, threads=options.threads)) as so8t,
        closing(StockProgram(options.base or options.gguf, so8t, options.threads)) as stock,
    ):
        cases = stratified_sample(load_cases(CASES), options.cases + WARM_UP, options.seed)
        prompts = [
            so8t.protocol.prompt_ids(case.conversation, case.policy, so8t.tokenize).ids
            for case in cases
        ]
        prompts = [ids for ids in prompts if len(ids) <= so8t.max_prompt_tokens]
        print(
            f"{platform.platform()}, {options.threads} threads; n={len(prompts) - WARM_UP}, "
            f"{statistics.median(map(len, prompts)):.0f} tokens (median)\n\n"
            "| ms, p50 / p95 / p99 | cold | warm prefix |\n| --- | ---: | ---: |"
        )
        print_table([measure(so8t, stock, prompts, cold) for cold in (True, False)])


def print_table(measured: Sequence[dict[str, list[float]]]) -> None:
    rows: dict[str, Callable[[dict[str, list[float]]], list[float]]] = {
        "time to verdict": lambda times: times["verdict"],
        "first reply token, SO8T": lambda times: times["reply"],
        "first reply token, base without a verdict": lambda times: times["base"],
        "extra for the verdict, per prompt": lambda times: list(
            np.subtract(times["reply"], times["base"])
        ),
        "one decode step": lambda times: times["decode step"],
    }
    for name, values in rows.items():
        cells = (
            " / ".join(f"{q:.1f}" for q in latency_quantiles(values(t)) or ()) for t in measured
        )
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

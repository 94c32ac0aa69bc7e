"""Verdicts per second: SO8T's backends against lm-evaluation-harness, same cases, same model.

Run: python benchmarks/speed/lm_eval_speed.py [--hf DIR] [--gguf FILE] [--dtype float32|auto]

The harness (``pip install -c constraints.txt lm-eval==0.4.13``) runs as its users run it: Hugging
Face backend, chat template, a multiple-choice task over the three verdict tokens, batches of 16. It
and SO8T's PyTorch backend read one merged directory; SO8T's llama.cpp backend reads the Q8_0 GGUF.
Timed is text to verdict with the model loaded: rendering, tokenizing, scoring, and the harness's
own report without its bootstrap; ``in the model`` is its scoring call alone. Rounds alternate, and
verdicts are compared. Where other jobs share the machine, the ratio of processor times at
``--threads 1`` is what counts. The task and its data are written to a temporary directory; nothing
is downloaded, and nothing written stays. Exit code 2: the harness is not installed.
"""

# ruff: noqa: E402 - the harness is looked for, and told to stay offline, before it is imported
import argparse
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
HARNESS: Final = "lm_eval"
if importlib.util.find_spec(HARNESS) is None:
    sys.stderr.write(
        f"{HARNESS} is not installed; install it with: "
        f"pip install -c {ROOT / 'constraints.txt'} lm-eval==0.4.13\n"
    )
    sys.exit(2)

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
_SCRATCH: Final = tempfile.TemporaryDirectory(prefix="lm-eval-speed-")
os.environ["HF_HOME"] = _SCRATCH.name  # read when datasets is imported; keeps its cache out of ours

import datasets
import torch
import yaml
from lm_eval import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from verdict_speed import BATCH, POLICY, cpu_name, short_cases

from so8t_eval.backends.cpu_threads import default_threads
from so8t_eval.backends.judge import Judged
from so8t_eval.backends.registry import ModelSpec, open_backend, reference_models
from so8t_eval.backends.token_id_judge import TokenIdJudge
from so8t_eval.cases import Case
from so8t_eval.labels import SEVERITY_ORDER, VERDICT_TOKENS, Verdict

TASK: Final = "so8t_verdict"
IN_THE_MODEL: Final = "the same, in the model"

Verdicts = list[Verdict]


class Contestant(NamedTuple):
    """A way to judge the first cases, and the token ids that it makes of a case."""

    name: str
    judge: Callable[[int], Verdicts]
    ids: Callable[[Case], list[int]]


class Spent(NamedTuple):
    """Time that one case took on average: by the clock, and of all processor cores together."""

    wall_s: float
    cpu_s: float


class TimedModel(HFLM):  # type: ignore[misc]
    """The harness's Hugging Face model, which also notes what its scoring call took."""

    scoring = Spent(0.0, 0.0)

    def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
        started = now()
        scored = super().loglikelihood(requests, disable_tqdm=True)
        self.scoring = per_case(started, len(scored) // len(VERDICT_TOKENS))
        return scored


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    logging.disable(logging.WARNING)
    datasets.disable_progress_bars()
    cases = short_cases(options.cases, options.seed)
    with contestants(options, cases) as (entries, harness):
        print_setting(options, cases, entries)
        for entry in entries:
            entry.judge(min(BATCH, len(cases)))  # warm-up
        spent: dict[str, list[Spent]] = {}
        verdicts: dict[str, Verdicts] = {}
        for _ in range(options.rounds):
            for entry in entries:
                started = now()
                found = entry.judge(len(cases))
                spent.setdefault(entry.name, []).append(per_case(started, len(cases)))
                if entry is entries[0]:
                    spent.setdefault(IN_THE_MODEL, []).append(harness.scoring)
                check_repeats(entry.name, found, verdicts)
    print_results(spent, verdicts)


def now() -> Spent:
    return Spent(time.perf_counter(), time.process_time())


def per_case(started: Spent, n: int) -> Spent:
    """Return what each of ``n`` cases took since then."""
    wall_s, cpu_s = now()
    return Spent((wall_s - started.wall_s) / n, (cpu_s - started.cpu_s) / n)


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--hf", type=Path, help="merged directory (default: the reference model's)")
    parser.add_argument("--gguf", type=Path, help="Q8_0 GGUF (default: the reference model's)")
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=default_threads())
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "auto"), default="float32")
    options = parser.parse_args()
    if options.hf is None or options.gguf is None:
        reference = {spec.prefix: spec.path for spec in reference_models(print)}
        options.gguf = options.gguf or reference["llamacpp"]
        options.hf = options.hf or exported(reference["torch"])
    return options


def exported(run: Path) -> Path:
    """Export a run as a merged directory that lives as long as this process."""
    target = Path(_SCRATCH.name) / "merged"
    command = [sys.executable, "-m", "so8t_train.cli", "export", str(run), "--format", "hf"]
    command += ["--quant", "f32", "--certificate", "none", "-o", str(target)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return target


@contextmanager
def contestants(
    options: argparse.Namespace, cases: Sequence[Case]
) -> Iterator[tuple[list[Contestant], TimedModel]]:
    """Load every model, yield the contestants and the harness's model, close the models."""
    dtype = None if options.dtype == "auto" else options.dtype
    models = {
        f"SO8T PyTorch, {options.dtype}": ModelSpec("torch", options.hf),
        "SO8T llama.cpp, Q8_0": ModelSpec("llamacpp", options.gguf),
    }
    with ExitStack() as stack:
        harness = TimedModel(
            pretrained=str(options.hf), device="cpu", dtype=options.dtype, batch_size=BATCH
        )
        entries = [harness_contestant(harness, options.dtype, cases)]
        for name, spec in models.items():
            backend = open_backend(spec, threads=options.threads, torch_dtype=dtype)
            entries.append(
                so8t_contestant(name, TokenIdJudge(stack.enter_context(closing(backend))), cases)
            )
        yield entries, harness


def harness_contestant(model: TimedModel, dtype: str, cases: Sequence[Case]) -> Contestant:
    manager = TaskManager(include_path=write_task(cases), include_defaults=False)

    def judge(n: int) -> Verdicts:
        results: Any = simple_evaluate(
            model=model,
            tasks=[TASK],
            batch_size=BATCH,
            system_instruction=POLICY,
            apply_chat_template=True,
            bootstrap_iters=0,
            limit=n,
            task_manager=manager,
        )
        samples = sorted(results["samples"][TASK], key=lambda sample: sample["doc_id"])
        return [likeliest(sample["filtered_resps"]) for sample in samples]

    def ids(case: Case) -> list[int]:
        turns = [{"role": "system", "content": POLICY}, {"role": "user", "content": case.prompt}]
        return list(model.tok_encode(model.apply_chat_template(turns)))

    return Contestant(f"lm-evaluation-harness, {dtype}", judge, ids)


def write_task(cases: Sequence[Case]) -> str:
    """Write the task and its data; return the directory that the harness is to search."""
    directory = Path(_SCRATCH.name) / "task"
    directory.mkdir()
    data = directory / "cases.jsonl"
    with data.open("w", encoding="utf-8") as stream:
        for case in cases:
            label = case.verdict.severity
            stream.write(json.dumps({"prompt": case.prompt, "label": label}) + "\n")
    task = {
        "task": TASK,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_target": "label",
        "doc_to_choice": list(VERDICT_TOKENS),
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    (directory / f"{TASK}.yaml").write_text(yaml.safe_dump(task), encoding="utf-8")
    return str(directory)


def likeliest(choices: Sequence[tuple[float, bool]]) -> Verdict:
    """Return the verdict of the highest log-likelihood, the more severe one on a tie."""
    best = max(range(len(choices)), key=lambda place: (choices[place][0], place))
    return SEVERITY_ORDER[best]


def so8t_contestant(name: str, judge: TokenIdJudge, cases: Sequence[Case]) -> Contestant:
    with_policy = [case.model_copy(update={"policy": POLICY}) for case in cases]

    def judge_first(n: int) -> Verdicts:
        found: dict[int, Verdict] = {}
        for place, outcome in judge.judge([judge.prepare(case) for case in with_policy[:n]]):
            if not isinstance(outcome, Judged):
                raise outcome
            found[place] = outcome.verdict
        return [found[place] for place in range(n)]

    def ids(case: Case) -> list[int]:
        return judge.prepare(case.model_copy(update={"policy": POLICY})).windows[0]

    return Contestant(name, judge_first, ids)


def check_repeats(name: str, found: Verdicts, known: dict[str, Verdicts]) -> None:
    """Note a contestant's verdicts; they must not change from round to round."""
    if known.setdefault(name, found) != found:
        raise SystemExit(f"{name}: verdicts differ from one round to the next")


def print_setting(
    options: argparse.Namespace, cases: Sequence[Case], entries: Sequence[Contestant]
) -> None:
    made = [[entry.ids(case) for case in cases] for entry in entries]
    lengths = sorted(map(len, made[0]))
    alike = sum(all(ids == rows[0] for ids in rows) for rows in zip(*made, strict=True))
    names = ("torch", "transformers", "lm_eval", "llama_cpp_python")
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    print(f"machine   {cpu_name()}, {options.threads} threads{load}, {platform.platform()}")
    print("versions ", ", ".join(f"{n} {importlib.metadata.version(n)}" for n in names))
    print(f"models    {options.hf} ({options.dtype}) | {options.gguf}")
    print(
        f"prompts   n={len(cases)}, {statistics.median(lengths):.0f} tokens (median; longest "
        f"{lengths[-1]}), policy included; same token ids in all three: {alike} of {len(cases)}; "
        f"{options.rounds} rounds after a warm-up",
        flush=True,
    )


def print_results(spent: dict[str, list[Spent]], verdicts: dict[str, Verdicts]) -> None:
    rival, *_ = spent
    print(
        "\n| medians | cases/s | rounds | ratio | processor s per case | ratio | same verdict |\n"
        "| --- | ---: | --- | ---: | ---: | ---: | ---: |"
    )
    for name, rounds in spent.items():
        rates = [1 / took.wall_s for took in rounds]
        pairs = list(zip(spent[rival], rounds, strict=True))
        faster = statistics.median(theirs.wall_s / ours.wall_s for theirs, ours in pairs)
        cheaper = statistics.median(theirs.cpu_s / ours.cpu_s for theirs, ours in pairs)
        cpu_s = statistics.median(took.cpu_s for took in rounds)
        print(
            f"| {name} | {statistics.median(rates):.2f} | {' '.join(f'{r:.2f}' for r in rates)} | "
            f"{faster:.2f}× | {cpu_s:.3f} | {cheaper:.2f}× | {agreement(name, rival, verdicts)} |"
        )


def agreement(name: str, rival: str, verdicts: dict[str, Verdicts]) -> str:
    """Return on how many cases both gave the same verdict, for the table."""
    if name == rival or name not in verdicts:
        return ""
    same = sum(a is b for a, b in zip(verdicts[name], verdicts[rival], strict=True))
    return f"{same} of {len(verdicts[rival])}"


if __name__ == "__main__":
    main()

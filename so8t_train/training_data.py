"""Turn labelled cases into token sequences for the verdict pass and the reply pass."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.cases import Case, load_cases
from so8t_eval.errors import CaseFileError, ConfigError
from so8t_eval.labels import SEVERITY_ORDER, Verdict
from so8t_train.config import FitConfig
from so8t_train.packing import PackedSequence


class TrainingExample(NamedTuple):
    """One case, tokenized: the prompt up to the verdict position and the reply, if it has one."""

    id: str
    verdict: Verdict
    category: str
    prompt: PackedSequence
    reply: PackedSequence | None


class TrainingSet(NamedTuple):
    """Tokenized examples in file order, and the ids of what is longer than ``max_length``."""

    examples: list[TrainingExample]
    too_long: list[str]
    """Cases whose prompt is: left out."""
    long_replies: list[str]
    """Cases whose reply does not fit behind the prompt: their verdict alone is learned."""


def load_training_cases(files: Sequence[Path]) -> list[Case]:
    """Read several case files as one; an id used in two files is an error."""
    cases: list[Case] = []
    seen: dict[str, Path] = {}
    for file in files:
        for case in load_cases(file):
            if case.id in seen:
                raise CaseFileError(
                    file, None, "id", f"{case.id!r} is in {seen[case.id]} too; ids must be unique"
                )
            seen[case.id] = file
            cases.append(case)
    return cases


def check_verdicts(
    cases: Sequence[Case] | Sequence[TrainingExample], config: FitConfig, which: str = ""
) -> list[Verdict]:
    """The verdicts without a case; ``which`` says in the error what is left of the cases.

    Raises:
        ConfigError: a verdict has no training case, and no run is continued that has learned it.
    """
    present = {case.verdict for case in cases}
    missing = [verdict for verdict in SEVERITY_ORDER if verdict not in present]
    if missing and config.init_from is None:
        raise ConfigError(
            f"train_file: no case with verdict {', '.join(v.value for v in missing)}{which}; the "
            "verdict head needs examples of all three: add some, or keep the shipped training file "
            "in train_file"
        )
    return missing


def class_weights(
    cases: Sequence[Case] | Sequence[TrainingExample], config: FitConfig
) -> dict[Verdict, float]:
    """Loss weight of each verdict; ``balanced`` gives every class the same total, mean 1.

    Raises:
        ConfigError: as ``check_verdicts``.
    """
    missing = check_verdicts(cases, config)
    if isinstance(config.class_weights, tuple):
        return dict(zip(SEVERITY_ORDER, config.class_weights, strict=True))
    if config.class_weights == "none":
        return dict.fromkeys(SEVERITY_ORDER, 1.0)
    counts = Counter(case.verdict for case in cases)
    present = len(SEVERITY_ORDER) - len(missing)
    return {v: len(cases) / (present * counts[v]) if counts[v] else 1.0 for v in SEVERITY_ORDER}


def tokenize_cases(
    cases: Sequence[Case],
    tokenizer: HfTokenizer,
    verdict_ids: Sequence[int],
    weights: dict[Verdict, float] | None,
    max_length: int,
) -> TrainingSet:
    """Tokenize every case once, by the verdict protocol; what is too long is left out and named.

    Without ``weights`` every case weighs 1.
    """
    end = tokenizer.tokenize(tokenizer.protocol.eos_token, True)
    examples: list[TrainingExample] = []
    too_long: list[str] = []
    long_replies: list[str] = []
    for case in cases:
        ids = tokenizer.protocol.prompt_ids(case.conversation, case.policy, tokenizer.tokenize)
        own = (*ids.body, *ids.tail)
        verdict_id = verdict_ids[case.verdict.severity]
        weight = 1.0 if weights is None else weights[case.verdict]
        prompt = PackedSequence(ids.head, own, len(own) - 1, (verdict_id,), weight)
        if prompt.length > max_length:
            too_long.append(case.id)
            continue
        reply = None
        if case.reply:
            answer = (*tokenizer.tokenize(case.reply, False), *end)
            reply = PackedSequence(ids.head, (*own, verdict_id, *answer[:-1]), len(own), answer)
            if reply.length > max_length:
                reply = None
                long_replies.append(case.id)
        examples.append(TrainingExample(case.id, case.verdict, case.category, prompt, reply))
    return TrainingSet(examples, too_long, long_replies)


def weighted(data: TrainingSet, config: FitConfig) -> TrainingSet:
    """The set with its class weights, counted over the cases that are trained on.

    Raises:
        ConfigError: a verdict has no case that fits ``max_length``.
    """
    check_verdicts(data.examples, config, f" fits max_length={config.max_length} tokens")
    weights = class_weights(data.examples, config)
    examples = [
        example._replace(prompt=example.prompt._replace(weight=weights[example.verdict]))
        for example in data.examples
    ]
    return data._replace(examples=examples)


def step_order(n_examples: int, cases_per_step: int, epoch: int, seed: int) -> list[list[int]]:
    """Example indices of every optimizer step of one epoch; a short last step is kept."""
    rng = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(n_examples, generator=rng).tolist()
    return [order[i : i + cases_per_step] for i in range(0, n_examples, cases_per_step)]

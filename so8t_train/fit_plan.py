"""The plan of a fit before it starts: memory, work, whether it fits, and what would change that."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal, NamedTuple

import psutil
import torch

from so8t_train.base_model import BaseModelSource, load_tokenizer
from so8t_train.base_vocabulary import embedding_rows
from so8t_train.compute_dtype import compute_dtype
from so8t_train.config import FitConfig
from so8t_train.continuation import origin_directory
from so8t_train.cpu_lora import MOST_MEMORY_SHARE
from so8t_train.memory_plan import Device, MemoryPlan, Setting, lora_parameters, plan_memory
from so8t_train.model_shape import ModelShape, locate_base, read_shape
from so8t_train.pass_sizes import PassSize, fit_passes
from so8t_train.replay import load_fit_cases
from so8t_train.start_checks import check_device, check_shape
from so8t_train.training_data import (
    TrainingExample,
    TrainingSet,
    tokenize_cases,
)
from so8t_train.training_plan import total_steps

PREDICTION_ERROR: Final = 0.15
"""Relative error of a predicted peak that benchmarks/planner_check.py allows."""
_WORTH_FOUR_BITS: Final = 0.05
"""Share of the peak that a 4-bit base must save to be suggested: it costs accuracy."""
_CGROUP: Final = Path("/sys/fs/cgroup")
Fit = Literal["fits", "close", "does not fit"]


class Work(NamedTuple):
    """What a fit computes, over all its passes."""

    steps: int
    tokens: int
    flops: float
    """Floating-point operations of the matrix products."""


class Suggestion(NamedTuple):
    """Changed configuration keys, what they would do, and what they cost besides."""

    changes: dict[str, object]
    peak: int
    work: Work
    note: str


class FitPlan(NamedTuple):
    """What ``so8t-train plan`` shows."""

    config: FitConfig
    shape: ModelShape
    device: Device
    dtype: str
    memory: MemoryPlan
    work: Work
    steps_per_epoch: int
    left_out: int
    """Cases longer than ``max_length``."""
    available: int
    """Bytes that a fit may take."""
    suggestions: tuple[Suggestion, ...]

    @property
    def fit(self) -> Fit:
        """Whether this fit fits."""
        return self.judged(self.memory.peak)

    @property
    def epochs(self) -> float:
        """Passes over the training cases, whatever ``max_steps`` leaves of them."""
        return self.work.steps / self.steps_per_epoch

    def judged(self, peak: int) -> Fit:
        """Whether a predicted peak fits; close: the prediction's own error decides."""
        if peak > self.available:
            return "does not fit"
        return "fits" if peak * (1 + PREDICTION_ERROR) <= self.available else "close"


def plan_fit(config: FitConfig) -> FitPlan:
    """Predict the fit of ``config``: headers and case files are read, weights are not.

    Raises:
        ConfigError, CaseFileError, ModelFileError: as a fit would, for what is missing or broken.
    """
    check_device(config)
    origin_directory(config)
    around = surroundings(config)
    planner = _Planner(config, locate_base(config.base_model), around)
    check_shape(config, planner.shape)
    memory, work = planner.outlook(config)
    return FitPlan(
        config,
        planner.shape,
        around.device,
        str(compute_dtype(config)).removeprefix("torch."),
        memory,
        work,
        -(-len(planner.data.examples) // config.cases_per_step),
        len(planner.data.too_long),
        around.available,
        tuple(planner.suggestions(memory)),
    )


class Surroundings(NamedTuple):
    """Where a fit runs, as found before it loads anything."""

    device: Device
    imports: int
    """Resident bytes of interpreter and libraries."""
    available: int
    """Bytes that a fit may take."""


def surroundings(config: FitConfig) -> Surroundings:
    """Measured in this process, which imports what a fit imports."""
    device = planned_device(config)
    return Surroundings(device, imported_bytes(), available_bytes(device))


def planned_device(config: FitConfig) -> Device:
    """What holds the model, and what the prediction is for."""
    return "cuda" if torch.cuda.is_available() and config.device_map != "cpu" else "cpu"


def planned_memory(
    config: FitConfig,
    shape: ModelShape,
    examples: Sequence[TrainingExample],
    passes: Sequence[PassSize],
    around: Surroundings,
) -> MemoryPlan:
    """Memory of every phase of a fit that trains ``examples`` in ``passes``."""
    item = compute_dtype(config).itemsize
    holds = shape.linear_parameters * item <= MOST_MEMORY_SHARE * around.available
    setting = Setting(shape, config, around.device, item, holds)
    token_ids = sum(map(_token_ids, examples))
    return plan_memory(setting, passes, imports=around.imports, token_ids=token_ids)


def imported_bytes() -> int:
    """Resident bytes of a process that has imported what a fit imports: measured, in this one."""
    import bitsandbytes  # noqa: F401
    import peft  # noqa: F401
    import transformers.models.llama.modeling_llama  # noqa: F401 - an architecture like any other

    return int(psutil.Process().memory_info().rss)


def tokenized_examples(config: FitConfig, source: BaseModelSource) -> TrainingSet:
    """The training set as a fit will tokenize it, its class weights aside."""
    first = embedding_rows(source)
    cases = load_fit_cases(config).cases
    verdict_ids = (first, first + 1, first + 2)
    return tokenize_cases(cases, load_tokenizer(source), verdict_ids, None, config.max_length)


def available_bytes(device: Device) -> int:
    """Free memory of the device; on a CPU what this process may take, itself included."""
    if device == "cuda":
        free, _total = torch.cuda.mem_get_info()
        return int(free)
    own = psutil.Process().memory_info().rss
    free = psutil.virtual_memory().available
    limit, used = (_number(_CGROUP / name) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:  # a container's own limit
        free = min(free, limit - used)
    return int(free + own)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text(encoding="ascii"))
    except (OSError, ValueError):  # no such file, or "max"
        return None


def pass_flops(shape: ModelShape, config: FitConfig, size: PassSize) -> float:
    """Floating-point operations of a pass, forward and backward.

    Two per weight and token forward, two backward: frozen weights get no gradient, LoRA's do (six
    in all). Checkpointing computes the layers' forward once more. Attention sees ``longest`` keys
    at most, half of them on average, and computes its probabilities twice.
    """
    lora = lora_parameters(shape, config)
    forward = 2 * size.tokens * (shape.linear_parameters + lora)
    attention = 2 * size.tokens * size.longest * shape.query_width * shape.layers
    again = forward + attention if config.gradient_checkpointing else 0
    logits = 4 * size.supervised * shape.vocabulary * shape.hidden
    return 2 * forward + 2 * size.tokens * lora + 3.5 * attention + again + logits


class _Planner:
    """Answers for one base and training set, under changing settings."""

    def __init__(self, config: FitConfig, source: BaseModelSource, around: Surroundings) -> None:
        self.config, self.around = config, around
        self.shape = read_shape(source, config.trust_remote_code)
        self.data = tokenized_examples(config, source)

    def outlook(self, config: FitConfig) -> tuple[MemoryPlan, Work]:
        """Memory and work under ``config``, which has this base and these case files."""
        shortened = (_shortened(e, config.max_length) for e in self.data.examples)
        examples = [example for example in shortened if example is not None]
        passes = fit_passes(examples, config)
        memory = planned_memory(config, self.shape, examples, passes, self.around)
        work = Work(
            total_steps(len(examples), config),
            sum(size.tokens for size in passes),
            sum(pass_flops(self.shape, config, size) for size in passes),
        )
        return memory, work

    def suggestions(self, now: MemoryPlan) -> Iterator[Suggestion]:
        """Changes that need less memory, each by itself, and the strongest together."""
        together: dict[str, object] = {}
        for changes, note in _changes(self.config, self.data.examples):
            memory, work = self.outlook(self.config.model_copy(update=changes))
            most = now.peak * (1 - _WORTH_FOUR_BITS if "load_in_4bit" in changes else 1)
            if memory.peak < most:
                yield Suggestion(changes, memory.peak, work, note)
                together |= changes
        if len(together) > 1:
            memory, work = self.outlook(self.config.model_copy(update=together))
            yield Suggestion(together, memory.peak, work, "all of these")


def _changes(
    config: FitConfig, examples: Sequence[TrainingExample]
) -> Iterator[tuple[dict[str, object], str]]:
    if not config.quantizes_base:
        yield {"load_in_8bit": True}, "frozen base in 8-bit"
    if not config.load_in_4bit:
        yield (
            {"load_in_8bit": False, "load_in_4bit": True},
            "frozen base in 4-bit, further from the float weights",
        )
    if not config.gradient_checkpointing:
        yield {"gradient_checkpointing": True}, "same weights, more time"
    if config.micro_batch_size > 1:
        half = config.micro_batch_size // 2
        steps = -(-config.cases_per_step // half)
        yield (
            {"micro_batch_size": half, "gradient_accumulation_steps": steps},
            "more passes, same cases per step",
        )
    longest = sorted(max(e.prompt.length, e.reply.length if e.reply else 0) for e in examples)
    shorter = max(64, -(-longest[int(0.99 * (len(longest) - 1))] // 32) * 32)
    if shorter < min(config.max_length, longest[-1]):
        yield {"max_length": shorter}, "about 1 % of the cases lose their reply or are left out"


def _shortened(example: TrainingExample, max_length: int) -> TrainingExample | None:
    """What ``tokenize_cases`` would make of an example under another ``max_length``."""
    if example.prompt.length > max_length:
        return None
    long = example.reply is not None and example.reply.length > max_length
    return example._replace(reply=None) if long else example


def _token_ids(example: TrainingExample) -> int:
    return example.prompt.length + (example.reply.length if example.reply else 0)

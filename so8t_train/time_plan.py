"""How long an epoch will take: a rough estimate from operations, or from steps really trained."""

import tempfile
import time
from pathlib import Path
from typing import Final, NamedTuple

import torch

from so8t_train.fit_plan import FitPlan, tokenized_examples
from so8t_train.model_shape import locate_base

USED_SHARE: Final = 0.4
"""Share of a bare matrix product's rate that training reaches; norms, attention, rotations and
memory traffic take the rest. One observation: the reference fit's 4.05e14 operations took 4377 s at
about 1.27 busy cores, 73 GFLOP/s of a core, where a bare product did 185. Hence "rough"."""
_PROBE_SECONDS: Final = 0.3
_PROBE_TOKENS: Final = 512
_MEASURED_STEPS: Final = 3


class TimePlan(NamedTuple):
    """Predicted time and what it rests on."""

    seconds_per_epoch: float
    seconds: float
    """Of the whole fit, its dev evaluations aside."""
    measured: bool
    basis: str


def rough_time(plan: FitPlan) -> TimePlan:
    """Time from operations and the rate of a bare matrix product, measured here for a moment."""
    rate = _matrix_product_rate(plan)
    seconds = plan.work.flops / (rate * USED_SHARE)
    basis = (
        f"rough: {plan.work.flops:.2e} operations at {USED_SHARE:.0%} of "
        f"the {rate / 1e9:.0f} GFLOP/s of a bare {plan.dtype} matrix product"
    )
    return TimePlan(seconds / plan.epochs, seconds, False, basis)


def measured_time(plan: FitPlan) -> TimePlan:
    """Time from the throughput of a few steps, trained here and thrown away.

    Loads the weights: what this needs, the fit needs too.
    """
    from so8t_train.safety_model import build_safety_model
    from so8t_train.step_report import StepReport, TrainingHooks
    from so8t_train.trainer import Trainer
    from so8t_train.training_data import weighted

    config, source = plan.config, locate_base(plan.config.base_model)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    reports: list[StepReport] = []
    with tempfile.TemporaryDirectory() as directory:
        short = config.model_copy(update={"max_steps": _MEASURED_STEPS, "output_dir": directory})
        model, _tokenizer = build_safety_model(source, short, getattr(torch, plan.dtype))
        examples = weighted(tokenized_examples(config, source), config).examples
        trainer = Trainer(
            model,
            short,
            examples=examples,
            dev=[],
            run_directory=Path(directory),
            start_sha256="",
        )
        trainer.run(TrainingHooks(reports.append, lambda: False))
    timed = reports[1:] or reports  # the first step compiles, and starts threads
    tokens, taken = sum(r.tokens for r in timed), sum(r.step_s for r in timed)
    seconds = plan.work.tokens * taken / tokens
    basis = f"measured: {tokens / taken:.0f} tokens/s over {len(timed)} steps"
    return TimePlan(seconds / plan.epochs, seconds, True, basis)


def _matrix_product_rate(plan: FitPlan) -> float:
    """Floating-point operations per second of the MLP's product, as it is on this device now."""
    shape, dtype = plan.shape, getattr(torch, plan.dtype)
    rows = torch.zeros(_PROBE_TOKENS, shape.hidden, dtype=dtype, device=plan.device)
    weight = torch.zeros(shape.hidden, shape.intermediate, dtype=dtype, device=plan.device)
    threads = torch.get_num_threads()
    torch.set_num_threads(plan.config.threads or threads)
    rows @ weight
    _wait(plan)
    done, started = 0, time.perf_counter()
    while time.perf_counter() - started < _PROBE_SECONDS:
        rows @ weight
        _wait(plan)
        done += 1
    taken = time.perf_counter() - started
    torch.set_num_threads(threads)
    return 2.0 * done * _PROBE_TOKENS * shape.hidden * shape.intermediate / taken


def _wait(plan: FitPlan) -> None:
    if plan.device == "cuda":
        torch.cuda.synchronize()

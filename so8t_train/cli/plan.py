"""``so8t-train plan``: memory and time of a fit, before any weights are loaded."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

if TYPE_CHECKING:
    from so8t_eval.plain_tables import TablePrinter
    from so8t_train.fit_plan import FitPlan, Suggestion
    from so8t_train.time_plan import TimePlan

_GIB: Final = float(1 << 30)
_EXIT_CODES: Final = {"fits": 0, "does not fit": 2, "close": 4}


@click.command(short_help="Predict memory and time of a fit.")
@click.argument("config", type=click.Path(path_type=Path))
@click.option("--measure", is_flag=True, help="Time a few real steps; loads the weights.")
@click.option("--threads", type=click.IntRange(min=1), help="Override threads (CPU).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object; sizes in bytes.")
def plan(*, config: Path, measure: bool, threads: int | None, as_json: bool) -> int:
    """Predict what the fit of CONFIG (YAML) will need, before any weights are loaded.

    Shows the memory of every phase part by part, time per epoch, whether it fits, and what other
    settings would need. docs/plan.md says what is counted and how well it agrees with fits.

    Ends with 0 when it fits, with 2 when it does not, with 4 when it is too close to tell.
    """
    import json

    from rich.console import Console

    from so8t_eval.plain_tables import TablePrinter
    from so8t_train.config import load_config
    from so8t_train.fit_plan import plan_fit
    from so8t_train.time_plan import measured_time, rough_time

    settings = load_config(config)
    if threads is not None:
        settings = settings.model_copy(update={"threads": threads})
    result = plan_fit(settings)
    time = measured_time(result) if measure else rough_time(result)
    if as_json:
        click.echo(json.dumps(_as_dict(result, time), indent=2))
    else:
        _print(TablePrinter(Console()), result, time)
    return _EXIT_CODES[result.fit]


def _as_dict(plan: "FitPlan", time: "TimePlan") -> dict[str, Any]:
    return {
        "fit": plan.fit,
        "device": plan.device,
        "dtype": plan.dtype,
        "peak": plan.memory.peak,
        "available": plan.available,
        "imports": plan.memory.imports,
        "phases": {
            p.name: {part.name: part.n_bytes for part in p.parts} for p in plan.memory.phases
        },
        "largest_pass": plan.memory.largest._asdict(),
        "parameters": plan.shape.parameters,
        "left_out": plan.left_out,
        "work": plan.work._asdict(),
        "time": time._asdict(),
        "suggestions": [
            {"fit": plan.judged(s.peak), **s._asdict(), "work": s.work._asdict()}
            for s in plan.suggestions
        ],
    }


def _print(printer: "TablePrinter", plan: "FitPlan", time: "TimePlan") -> None:
    import torch

    from so8t_train.compute_dtype import EMULATED, is_emulated

    memory, size = plan.memory, plan.memory.largest
    names = list(dict.fromkeys(part.name for phase in memory.phases for part in phase.parts))
    rows = [
        [name, *(_cell(dict(phase.parts).get(name, 0)) for phase in memory.phases)]
        for name in names
    ]
    printer.line(
        f"{plan.config.base_model}: {plan.shape.parameters / 1e6:.0f} M parameters, "
        f"{plan.shape.layers} layers, {plan.dtype} activations, on {plan.device}"
    )
    printer.table(
        ["GiB", *(phase.name for phase in memory.phases)],
        [*rows, ["together", *(_cell(phase.total) for phase in memory.phases)]],
    )
    printer.line(
        f"largest pass: the {size.kind} pass of step {size.step + 1}, {size.cases} cases, "
        f"{size.tokens} tokens, logits at {size.supervised} of them"
    )
    printer.line(f"peak {_gib(memory.peak)} of {_gib(plan.available)} available: {plan.fit}")
    printer.line(
        f"time {_duration(time.seconds_per_epoch)} per epoch, {_duration(time.seconds)} for "
        f"{plan.work.steps} steps ({time.basis})"
    )
    if is_emulated(getattr(torch, plan.dtype), torch.device(plan.device)):
        printer.line(f"warning: {EMULATED}")
    if plan.left_out:
        printer.line(f"{plan.left_out} cases are longer than max_length and left out")
    if plan.suggestions:
        printer.line()
        printer.line("With other settings:")
    for suggestion in plan.suggestions:
        printer.line(_suggested(plan, suggestion))


def _suggested(plan: "FitPlan", suggestion: "Suggestion") -> str:
    changes = ", ".join(f"{key}: {value}".lower() for key, value in suggestion.changes.items())
    return (
        f"- {changes} ({suggestion.note}): peak {_gib(suggestion.peak)} "
        f"({suggestion.peak / plan.memory.peak - 1:+.0%}, {plan.judged(suggestion.peak)}), "
        f"operations {suggestion.work.flops / plan.work.flops - 1:+.0%}"
    )


def _cell(n_bytes: int) -> str:
    return f"{n_bytes / _GIB:.3f}" if n_bytes else ""


def _gib(n_bytes: int) -> str:
    return f"{n_bytes / _GIB:.2f} GiB"


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"

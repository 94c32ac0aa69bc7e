"""``so8t-train fit``: train an adapter with rotation gates and verdict rows."""

from pathlib import Path
from typing import Final

import click

_RESUME_VALUES: Final = ("yes", "auto")


class _FitCommand(click.Command):
    """Lets --resume stand alone before CONFIG, which click would take for its value."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        following = [*args, ""][1:]
        spelled = [
            "--resume=yes" if (arg, after in _RESUME_VALUES) == ("--resume", False) else arg
            for arg, after in zip(args, following, strict=True)
        ]
        return super().parse_args(ctx, spelled)


@click.command(cls=_FitCommand)
@click.argument("config", type=click.Path(path_type=Path))
@click.option(
    "--resume",
    type=click.Choice(_RESUME_VALUES),
    is_flag=False,
    flag_value="yes",
    help="Continue an interrupted run from its newest good checkpoint; auto: start if there is "
    "none, and do nothing if the run is finished.",
)
@click.option("--output-dir", type=click.Path(path_type=Path), help="Override output_dir.")
@click.option("--max-steps", type=click.IntRange(min=1), help="Override max_steps.")
@click.option("--seed", type=click.IntRange(0, 2**32 - 1), help="Override seed.")
@click.option("--threads", type=click.IntRange(min=1), help="Override threads (CPU).")
def fit(
    *,
    config: Path,
    resume: str | None,
    output_dir: Path | None,
    max_steps: int | None,
    seed: int | None,
    threads: int | None,
) -> None:
    """Train CONFIG (YAML) into a run directory.

    Ctrl-C saves a checkpoint and stops; the same command with --resume goes on from there and ends
    with the same weights. A command that is started again whatever happened takes --resume auto.
    docs/config.md explains every key.
    """
    from so8t_eval.errors import Interrupted
    from so8t_train.cli.fit_progress import FitProgress
    from so8t_train.config import load_config
    from so8t_train.data_parallel import is_main_process
    from so8t_train.fit import Resume
    from so8t_train.fit import fit as run_fit

    overrides = {
        "output_dir": output_dir,
        "max_steps": max_steps,
        "seed": seed,
        "threads": threads,
    }
    settings = load_config(config).model_copy(
        update={key: value for key, value in overrides.items() if value is not None}
    )
    how: Resume = "auto" if resume == "auto" else resume is not None
    try:
        with FitProgress(shown=is_main_process()) as progress:
            result = run_fit(settings, resume=how, reporter=progress.reporter)
    except Interrupted as error:
        if not is_main_process():  # which says it
            raise click.exceptions.Exit(error.exit_code) from error
        raise Interrupted(f"{error}\nresume with: {_resume_command()}") from error
    if not is_main_process():
        return
    click.echo(f"{result.steps} steps in {result.seconds:.0f} s; run directory: {result.directory}")
    if result.dev is not None:
        dev = result.dev
        click.echo(
            f"dev (n={dev.n}): accuracy {dev.accuracy:.3f}, refuse recall "
            f"{_share(dev.refuse_recall)}, unsafe allow {_share(dev.unsafe_allow_rate)}, "
            f"over-refusal {_share(dev.over_refusal_rate)}, temperature {result.temperature:.2f}"
        )
    if result.moved is not None:
        from so8t_train.continuation import movement_line

        click.echo(movement_line(result.moved))
    click.echo(f"next: so8t-train export {result.directory} --quant f16,q8_0 -o gguf")


def _share(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.3f}"


def _resume_command() -> str:
    import shlex
    import sys

    arguments = sys.argv[1:]
    if not any(a.split("=")[0] == "--resume" for a in arguments):
        arguments = [*arguments, "--resume"]
    return shlex.join(["so8t-train", *arguments])

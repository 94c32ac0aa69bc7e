"""The ``so8t-train`` command: subcommands are imported when they run, so that help is instant."""

from typing import Final

import click

from so8t_eval import __version__
from so8t_eval.lazy_group import LazyCommand, LazyGroup

COMMANDS: Final = {
    "data": LazyCommand(
        "so8t_train.cli.data", "data", "Check, split, balance and preview case files."
    ),
    "doctor": LazyCommand("so8t_train.cli.doctor", "doctor", "Show what this machine can do."),
    "export": LazyCommand(
        "so8t_train.cli.export", "export", "Fold a run into one GGUF per quantization."
    ),
    "families": LazyCommand(
        "so8t_train.cli.families", "families", "List the model families that can be a base."
    ),
    "fit": LazyCommand("so8t_train.cli.fit", "fit", "Train CONFIG (YAML) into a run directory."),
    "plan": LazyCommand("so8t_train.cli.plan", "plan", "Predict memory and time of a fit."),
}


@click.group(
    "so8t-train",
    cls=LazyGroup,
    lazy_commands=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="so8t-train")
def main() -> None:
    """Train a safety verdict into a local language model, and export it as one GGUF.

    Exit codes: 0 done, 2 usage or config error, 3 run-time error, 130 interrupted.
    """

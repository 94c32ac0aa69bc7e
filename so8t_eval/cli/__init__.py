"""The ``so8t-eval`` command: subcommands are imported when they run, so that help is instant."""

from typing import Final

import click

from so8t_eval import __version__
from so8t_eval.lazy_group import LazyCommand, LazyGroup

COMMANDS: Final = {
    "judge": LazyCommand("so8t_eval.cli.judge", "judge", "Judge one text."),
    "run": LazyCommand("so8t_eval.cli.run", "run", "Run a benchmark file on one or more models."),
}


@click.group(
    cls=LazyGroup,
    lazy_commands=COMMANDS,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(__version__, prog_name="so8t-eval")
def main() -> None:
    """Measure the safety verdicts of local language models.

    Exit codes: 0 done or CI gate passed, 1 CI gate failed, 2 usage, config or case-file error,
    3 run-time error, 4 inconclusive, 130 interrupted.
    """

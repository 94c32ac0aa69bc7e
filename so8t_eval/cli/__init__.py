"""The ``so8t-eval`` command: subcommands are imported when they run, so that help is instant."""

import importlib
from typing import Final, NamedTuple

import click

from so8t_eval import __version__
from so8t_eval.cli_errors import So8tGroup


class LazyCommand(NamedTuple):
    """Where a subcommand lives, and its help line (a test keeps it equal to the command's own)."""

    module: str
    attribute: str
    short_help: str


COMMANDS: Final = {
    "judge": LazyCommand("so8t_eval.cli.judge", "judge", "Judge one text."),
    "run": LazyCommand("so8t_eval.cli.run", "run", "Run a benchmark file on one or more models."),
}


class LazyGroup(So8tGroup):
    """A group whose commands are listed from ``COMMANDS`` and imported on use."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all subcommands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a subcommand, None if there is no such name."""
        if cmd_name not in COMMANDS:
            return None
        lazy = COMMANDS[cmd_name]
        command: click.Command = getattr(importlib.import_module(lazy.module), lazy.attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name].short_help) for name in sorted(COMMANDS)])


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="so8t-eval")
def main() -> None:
    """Measure the safety verdicts of local language models.

    Exit codes: 0 done or CI gate passed, 1 CI gate failed, 2 usage, config or case-file error,
    3 run-time error, 4 inconclusive, 130 interrupted.
    """

"""A command group whose subcommands are imported when they run, so that help is instant."""

import importlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import click

from so8t_eval.cli_errors import So8tGroup


class LazyCommand(NamedTuple):
    """Where a subcommand lives, and its help line (a test keeps it equal to the command's own)."""

    module: str
    attribute: str
    short_help: str


class LazyGroup(So8tGroup):
    """A group that lists ``lazy_commands`` (by name) and imports one of them on use."""

    def __init__(
        self, *args: Any, lazy_commands: Mapping[str, LazyCommand] | None = None, **settings: Any
    ) -> None:
        super().__init__(*args, **settings)
        self.lazy_commands = dict(lazy_commands or {})

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names of all subcommands."""
        return sorted(self.lazy_commands)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return a subcommand, None if there is no such name."""
        lazy = self.lazy_commands.get(cmd_name)
        if lazy is None:
            return None
        command: click.Command = getattr(importlib.import_module(lazy.module), lazy.attribute)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the subcommands without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl(
                [(name, lazy.short_help) for name, lazy in sorted(self.lazy_commands.items())]
            )

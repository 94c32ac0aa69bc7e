"""The one place where exceptions become messages and exit codes.

0 done or CI gate passed, 1 CI gate failed, 2 usage, config or case-file error, 3 run-time error,
4 inconclusive, 130 interrupted. A command may return an exit code; it never calls sys.exit.
"""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any, Final

import click

from so8t_eval.errors import Interrupted, So8tError

EXIT_USAGE: Final = 2
EXIT_RUNTIME: Final = 3
EXIT_INTERRUPTED: Final = 130
DEBUG_VARIABLE: Final = "SO8T_DEBUG"
_RESUME_KEY: Final = "so8t.resume_command"


class OutputClosedError(So8tError):
    """Whoever read our output has gone; there is no one left to tell."""


def set_resume_command(command: str) -> None:
    """Note how the running command can be resumed, to be shown if it is interrupted."""
    click.get_current_context().meta[_RESUME_KEY] = command


class So8tGroup(click.Group):
    """A command group that ends with the exit codes of the contract."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command and exit the process (in standalone mode) with its code."""
        if not standalone_mode:
            return super().main(args, prog_name, complete_var, False, **extra)
        with _termination_interrupts():
            code = self._exit_code(args, prog_name, complete_var, extra)
        if code == EXIT_INTERRUPTED:
            # CPython ends by signal, whatever the exit code, if the interrupt struck inside an
            # exec'd string (as dataclasses use while importing); the next exec forgets that.
            exec("pass")  # noqa: S102
        sys.exit(_flush(code))

    def invoke(self, ctx: click.Context) -> Any:
        """Run the chosen command; an interrupt says how to resume."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            command = ctx.meta.get(_RESUME_KEY)
            hint = f"; what is done is kept, resume with:\n  {command}" if command else ""
            raise Interrupted(f"interrupted{hint}") from None
        except BrokenPipeError:
            raise OutputClosedError("the output was closed") from None

    def _exit_code(
        self,
        args: Sequence[str] | None,
        prog_name: str | None,
        complete_var: str | None,
        extra: dict[str, Any],
    ) -> int:
        name = prog_name or self.name or "so8t"
        try:
            result = super().main(args, prog_name, complete_var, False, **extra)
        except (Exception, KeyboardInterrupt, SystemExit) as error:
            return _reported(name, error)
        return result if isinstance(result, int) else 0


def _reported(name: str, error: BaseException) -> int:
    """Tell the user about an exception and return its exit code."""
    code = EXIT_RUNTIME
    match error:
        case OutputClosedError():
            pass
        case So8tError():
            _say(name, str(error))
            code = error.exit_code
        case click.ClickException():
            with contextlib.suppress(OSError):
                error.show()
            code = EXIT_USAGE
        case click.Abort() | KeyboardInterrupt():
            _say(name, "interrupted")
            code = EXIT_INTERRUPTED
        case SystemExit():  # click, when the reader of its help has gone
            code = error.code if error.code in (0, EXIT_USAGE) else EXIT_RUNTIME
        case Exception():
            _say_unexpected(name, error)
    return code


def _say(name: str, text: str) -> None:
    with contextlib.suppress(OSError):
        click.echo(f"{name}: {text}", err=True)


def _say_unexpected(name: str, error: Exception) -> None:
    if os.environ.get(DEBUG_VARIABLE) == "1":
        traceback.print_exception(error)
    reason = " ".join(str(error).split()) or "no reason given"
    hint = f"set {DEBUG_VARIABLE}=1 for a traceback"
    _say(name, f"unexpected {type(error).__name__}: {reason} ({hint})")


def _flush(code: int) -> int:
    """Flush the output here, where a closed pipe can still be handled."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # The interpreter flushes once more on exit; let it find an open file.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return code or EXIT_RUNTIME
    except OSError as error:
        _say("so8t", f"cannot write the output: {error.strerror or error}")
        return code or EXIT_RUNTIME
    return code


@contextlib.contextmanager
def _termination_interrupts() -> Iterator[None]:
    """Let SIGTERM end a command as Ctrl-C does: orderly, and resumable."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)

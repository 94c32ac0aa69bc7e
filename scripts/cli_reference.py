"""Write docs/cli.md from the commands' own help texts; ``--check`` only compares."""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import click

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
TARGET = ROOT / "docs" / "cli.md"
WIDTH = 90
INTRODUCTION = """# Commands

<!-- Written by scripts/cli_reference.py from the commands' help texts; edit those. -->

Every command ends with one of these exit codes:

| Code | Meaning |
| --- | --- |
| 0 | done, and every limit held |
| 1 | a limit does not hold (a rule of `gate`, an allowance of `attack-tokens` or `drift`) |
| 2 | usage, configuration or case-file error; nothing ran |
| 3 | run-time error: model file, runtime, disk, or a bug, with the reason |
| 4 | inconclusive: no rule failed, but the data cannot tell for at least one |
| 130 | interrupted; the message says how to resume |

`SO8T_DEBUG=1` shows the traceback of an unexpected error. `SO8T_CACHE_DIR` moves the directory in
which the reference GGUF is kept.
"""


def render() -> str:
    """Return the text of docs/cli.md."""
    from so8t_eval.cli import main as evaluate
    from so8t_train.cli import main as train

    parts = [INTRODUCTION]
    for program, group in (("so8t-eval", evaluate), ("so8t-train", train)):
        parts.append(f"\n## {program}\n\n")
        for path, text in help_texts(program, group):
            depth = len(path.split()) - len(program.split())
            if depth:
                parts.append(f"\n{'#' * (2 + depth)} {path}\n\n")
            parts.append(f"```text\n{text}\n```\n")
    return "".join(parts)


def help_texts(program: str, group: click.Group) -> Iterator[tuple[str, str]]:
    """Yield the command line and help text of a group, its commands, and those of groups in it."""
    # A fixed width: the writer's terminal must not change the file.
    context = click.Context(
        group,
        info_name=program,
        terminal_width=WIDTH,
        max_content_width=WIDTH,
        help_option_names=list(group.context_settings["help_option_names"]),
    )
    yield from _texts_below(program, group, context)


def _texts_below(
    path: str, command: click.Command, context: click.Context
) -> Iterator[tuple[str, str]]:
    yield path, command.get_help(context).rstrip()
    if not isinstance(command, click.Group):
        return
    for name in command.list_commands(context):
        inner = command.get_command(context, name)
        if inner is None:
            raise SystemExit(f"{path} lists {name} but does not have it")
        inner_context = click.Context(inner, info_name=name, parent=context)
        yield from _texts_below(f"{path} {name}", inner, inner_context)


def main(arguments: Sequence[str]) -> int:
    """Write the file, or with ``--check`` return 1 if it is out of step."""
    text = render()
    if "--check" not in arguments:
        TARGET.write_text(text, encoding="utf-8", newline="\n")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET} is out of step with the commands; run: python scripts/cli_reference.py")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""``so8t-train doctor``: one table of what this machine can do, from probes that really run."""

import json
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from so8t_train.doctor.diagnosis import Diagnosis


@click.command(short_help="Show what this machine can do.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> int:
    """Show what this machine can do: train, export, evaluate, and what is missing.

    Quantized layers run forward and backward, llama.cpp decodes a small model; it takes some
    seconds. Exit code 0 unless nothing works at all.
    """
    from so8t_eval.cli_errors import EXIT_RUNTIME
    from so8t_train.doctor.diagnosis import diagnose

    diagnosis = diagnose()
    if as_json:
        click.echo(json.dumps(_as_dict(diagnosis), indent=2))
    else:
        _print(diagnosis)
    return 0 if diagnosis.anything_works else EXIT_RUNTIME


def _as_dict(diagnosis: "Diagnosis") -> dict[str, object]:
    return {
        "findings": [finding._asdict() for finding in diagnosis.findings],
        "verdicts": [verdict._asdict() for verdict in diagnosis.verdicts],
        "seconds": round(diagnosis.seconds, 1),
    }


def _print(diagnosis: "Diagnosis") -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = Console()

    def shown(text: str) -> Text:
        encoding = console.encoding
        return Text(text.encode(encoding, "replace").decode(encoding))

    table = Table(highlight=False)
    for header in ("Probe", "", "Found", "What to do"):
        table.add_column(header, overflow="fold")
    for name, status, value, remedy in diagnosis.findings:
        table.add_row(shown(name), shown(status), shown(value), shown(remedy))
    console.print(table)
    for task, possible, note in diagnosis.verdicts:
        line = f"can {task}: {'yes' if possible else 'no'}" + (f" - {note}" if note else "")
        console.print(shown(line))

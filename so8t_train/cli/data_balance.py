"""``so8t-train data balance``: as many cases of every verdict, twins kept together."""

from pathlib import Path

import click

from so8t_eval.counted import counted
from so8t_train.cli.data_options import FILE, named, print_strata, seed_option, some_of

_PARTS = ("kept", "left out")


@click.command(short_help="Draw as many cases of every verdict.")
@click.argument("file", type=FILE)
@click.option("-o", "--output", type=FILE, required=True, metavar="OUT", help="File to write.")
@click.option(
    "--to",
    "per_verdict",
    type=click.IntRange(min=1),
    metavar="N",
    help="Cases of each verdict.  [default: as many as the smallest class has]",
)
@seed_option
@click.option("--force", is_flag=True, help="Replace OUT.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object, with all ids.")
def balance(
    *, file: Path, output: Path, per_verdict: int | None, seed: int, force: bool, as_json: bool
) -> None:
    """Draw as many cases of every verdict from the case file FILE.

    Twins stay with their partners ("twin of ID" in the note); languages keep their proportions
    within each verdict. No case is written twice. Training weighs verdicts by itself
    (class_weights: balanced); balance where time is short, or where the classes differ in quality.
    """
    import json

    from rich.console import Console

    from so8t_eval.plain_tables import TablePrinter
    from so8t_train.data_balance import balance_file

    result = balance_file(file, output, seed=seed, per_verdict=per_verdict, force=force)
    if as_json:
        facts = {
            "file": str(result.file),
            "seed": seed,
            "n": result.n,
            "n_kept": result.n_kept,
            "per_verdict": result.per_verdict,
            "strata": named(result.strata, ("kept", "left_out")),
            "twin_pairs": result.twin_pairs,
            "twin_pairs_kept": result.twin_pairs_kept,
            "unlinked_twins": result.unlinked_twins,
            "left_out": result.left_out,
        }
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    printer = TablePrinter(Console())
    print_strata(printer, result.strata, _PARTS)
    if per_verdict is None and result.per_verdict < result.smallest_class:
        printer.line(
            f"the smallest class has {result.smallest_class} cases; more than "
            f"{result.per_verdict} of each would part twins"
        )
    printer.line(f"twin pairs kept: {result.twin_pairs_kept} of {result.twin_pairs}")
    if result.unlinked_twins:
        n = len(result.unlinked_twins)
        printer.line(
            f"warning: {counted(n, 'case')} tagged twin without a partner in this file: "
            f"{some_of(result.unlinked_twins)}"
        )
    if result.left_out:
        printer.line(f"left out: {some_of(result.left_out)} (--json lists all)")
    printer.line(
        f"{result.file}: {result.n_kept} of {result.n} cases, {result.per_verdict} of each verdict"
    )

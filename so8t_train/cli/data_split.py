"""``so8t-train data split``: training and dev cases that do not resemble one another."""

from pathlib import Path

import click

from so8t_eval.counted import counted
from so8t_train.cli.data_options import FILE, named, print_strata, seed_option

_PARTS = ("dev", "train")


@click.command(short_help="Split a case file into train and dev.")
@click.argument("file", type=FILE)
@click.option(
    "-o",
    "--output-dir",
    type=FILE,
    required=True,
    metavar="DIR",
    help="Where to write train.jsonl and dev.jsonl.",
)
@click.option(
    "--dev",
    "dev_share",
    type=click.FloatRange(0, 1, min_open=True, max_open=True),
    default=0.1,
    show_default=True,
    metavar="SHARE",
    help="Share of the cases that go to dev.",
)
@seed_option
@click.option("--force", is_flag=True, help="Replace train.jsonl and dev.jsonl.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def split(
    *, file: Path, output_dir: Path, dev_share: float, seed: int, force: bool, as_json: bool
) -> None:
    """Split the case file FILE into train.jsonl and dev.jsonl.

    Twins stay with their partners ("twin of ID" in the note) and near-duplicates on one side, so
    dev results do not flatter. Whole groups are drawn, each verdict and language in proportion.
    Both files are read back and checked before they appear.
    """
    import json

    from rich.console import Console

    from so8t_eval.linting import ACROSS_FILES
    from so8t_eval.plain_tables import TablePrinter
    from so8t_train.data_split import split_file

    result = split_file(file, output_dir, dev_share=dev_share, seed=seed, force=force)
    if as_json:
        facts = {
            "train_file": str(result.train_file),
            "dev_file": str(result.dev_file),
            "seed": seed,
            "n_train": result.n_train,
            "n_dev": result.n_dev,
            "dev_share": result.dev_share,
            "strata": named(result.strata, _PARTS),
            "groups": result.n_groups,
            "largest_group": result.largest_group,
            "twin_pairs": result.twin_pairs,
            "near_duplicate_pairs": result.near_duplicate_pairs,
            "warnings": result.warnings,
        }
        click.echo(json.dumps(facts, ensure_ascii=False, indent=2))
        return
    printer = TablePrinter(Console())
    print_strata(printer, result.strata, _PARTS)
    printer.line(
        f"kept together: {result.twin_pairs} twin pairs, {result.near_duplicate_pairs} pairs "
        f"{ACROSS_FILES} or more similar; {result.n_groups} groups, the largest of "
        f"{result.largest_group} cases"
    )
    for warning in result.warnings:
        printer.line(f"warning: {warning}")
    printer.line(f"{result.train_file}: {counted(result.n_train, 'case')}")
    printer.line(f"{result.dev_file}: {counted(result.n_dev, 'case')}")
    printer.line("read back: every case once, no twin pair and no near-duplicates across")

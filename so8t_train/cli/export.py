"""``so8t-train export``: fold a run into ordinary model files, certified."""

from pathlib import Path
from typing import Literal

import click


@click.command()
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output-dir",
    type=click.Path(path_type=Path),
    required=True,
    help="Directory to create.",
)
@click.option(
    "--quant",
    help="Comma-separated: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0, iq4_xs, q3_k_m.  "
    "[default: f16,q8_0; for hf: f32]",
)
@click.option(
    "--format",
    "kind",
    type=click.Choice(["gguf", "hf"]),
    default="gguf",
    show_default=True,
    help="GGUF files, or a Hugging Face directory.",
)
@click.option(
    "--merge-base",
    type=click.Choice(["original", "dequant8", "dequant4"]),
    help="Weights to merge into: the float ones, or the 8- or 4-bit ones of training.  "
    "[default: merge_base of the run]",
)
@click.option(
    "--calibration",
    type=click.Path(path_type=Path),
    help="JSONL case file the certificate compares on.  [default: the shipped dev cases]",
)
@click.option(
    "--calibration-cases",
    type=click.IntRange(min=1),
    default=60,
    show_default=True,
    help="Number of cases to take of it, verdicts in proportion.",
)
@click.option(
    "--certificate",
    type=click.Choice(["full", "weights", "none"]),
    default="full",
    show_default=True,
    help="full compares the live model, the merged one and every file on cases, and needs memory "
    "for whole float models.  weights recomputes every merged tensor and runs nothing.",
)
@click.option(
    "--split-max-size",
    metavar="SIZE",
    help="Split larger GGUF files into parts of at most 500M, 2G, …; llama.cpp opens the first.",
)
@click.option(
    "--imatrix/--no-imatrix",
    default=False,
    show_default=True,
    help="Weigh rounding errors below Q8_0 by an importance matrix, half of it from the verdict "
    "positions. Not shown to help (docs/export.md). Needs --certificate full.",
)
@click.option(
    "--imatrix-file",
    type=click.Path(path_type=Path),
    help="JSONL case file to collect it on; cases compared on are left out.  "
    "[default: the shipped training cases]",
)
@click.option(
    "--imatrix-cases",
    type=click.IntRange(min=1),
    default=120,
    show_default=True,
    help="Number of cases to take of it, verdicts in proportion.",
)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
@click.option(
    "--resume",
    is_flag=True,
    help="Go on with an export to this directory that was interrupted or failed: GGUF files that "
    "are whole are not made or run again.",
)
def export(
    *,
    run: Path,
    output_dir: Path,
    quant: str | None,
    kind: Literal["gguf", "hf"],
    merge_base: Literal["original", "dequant8", "dequant4"] | None,
    calibration: Path | None,
    calibration_cases: int,
    certificate: Literal["full", "weights", "none"],
    split_max_size: str | None,
    imatrix: bool,
    imatrix_file: Path | None,
    imatrix_cases: int,
    threads: int | None,
    resume: bool,
) -> None:
    """Fold a run into one GGUF per quantization.

    RUN is a directory written by so8t-train fit. LoRA is merged and the rotation gates are folded,
    so the files are ordinary models for any llama.cpp program. certificate.json states how exactly;
    an export that fails it leaves no model behind. Weights are read, merged and written one block
    of rows at a time. An interrupted export keeps its whole GGUF files beside the directory, for
    the same command with --resume.
    """
    from so8t_train.cli.export_progress import ExportProgress, result_lines
    from so8t_train.export import ExportOptions
    from so8t_train.export import export as run_export

    options = ExportOptions(
        kind,
        quant,
        merge_base,
        calibration,
        calibration_cases,
        threads,
        certificate,
        split_max_size,
        imatrix,
        imatrix_file,
        imatrix_cases,
        resume,
    )
    with ExportProgress() as shown:
        result = run_export(run, output_dir, options, shown.news, shown.share)
    for line in result_lines(result):
        click.echo(line)

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
    help="Comma-separated: f32, f16, bf16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0.  "
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
    type=click.Choice(["original", "dequant8"]),
    help="Weights to merge into: the float ones, or the 8-bit ones of training.  "
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
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads.")
def export(
    *,
    run: Path,
    output_dir: Path,
    quant: str | None,
    kind: Literal["gguf", "hf"],
    merge_base: Literal["original", "dequant8"] | None,
    calibration: Path | None,
    calibration_cases: int,
    threads: int | None,
) -> None:
    """Fold a run into one GGUF per quantization.

    RUN is a directory written by so8t-train fit. LoRA is merged and the rotation gates are folded,
    so the files are ordinary models for any llama.cpp program. certificate.json states how exactly;
    an export that fails it leaves no model behind.
    """
    from so8t_train.export import ExportOptions
    from so8t_train.export import export as run_export

    options = ExportOptions(kind, quant, merge_base, calibration, calibration_cases, threads)
    result = run_export(run, output_dir, options, lambda line: click.echo(line, err=True))
    n = result.certificate.calibration.n
    for file in result.certificate.files:
        if file.kept:
            found = file.difference
            click.echo(
                f"{output_dir / file.file}  {file.bytes / 1e6:.0f} MB  verdict probabilities "
                f"within {found.max_probability_difference:.4f} (mean "
                f"{found.mean_probability_difference:.4f}) of the float model, "
                f"{len(found.flips)} of {n} verdicts flipped"
            )
    click.echo(f"certificate passed in {result.seconds:.0f} s: {output_dir / 'certificate.json'}")

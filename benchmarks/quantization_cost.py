"""What does each low-bit format cost the verdict, and what do precise rows or a matrix save?

    python benchmarks/quantization_cost.py [--cases 120] [--formats q4_k_m q4_0] [--rows]

The reference run as F16, against the same weights quantized without and with an importance matrix
(llama-imatrix's plain one, and with weight on the verdict positions), and with ``--rows`` also with
embedding and output matrix at llama.cpp's choice and at Q4_0. Matrices are collected on training
cases; figures are on dev cases which nothing here tunes on, leaving out ``--spent`` ones that a
choice was made on. Prints a Markdown table line by line; means with 95 % bootstrap intervals.
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from gguf import GGUFReader

from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.case_sampling import stratified_sample
from so8t_eval.cases import Case, load_cases
from so8t_eval.intervals import bootstrap, wilson
from so8t_eval.labels import SEVERITY_ORDER
from so8t_train.calibration import (
    DEFAULT_FILE,
    DEFAULT_IMPORTANCE_CASES,
    DEFAULT_IMPORTANCE_FILE,
    load_calibration,
    merged_model,
)
from so8t_train.float_files import checked_weights, write_quantizer_source
from so8t_train.importance import ImportanceMatrix, collect_importance
from so8t_train.merged_model import OpenRun, open_run
from so8t_train.quantization import FORMATS, QuantFormat, quantize_gguf
from so8t_train.reference_model import RUN_DIRECTORY
from so8t_train.run_dir import load_run

Probabilities = npt.NDArray[np.float64]
SPENT_SEED, SAMPLE_SEED = 7, 0
OTHER_ROWS: dict[str, int | None] = {"llama.cpp's choice": None, "forced": 2}
"""ggml's numbers of the types of embedding rows beside the format's own; 2 is Q4_0."""
DEFAULT_FORMATS = ["q6_k", "q5_k_m", "q4_k_m", "q4_0", "iq4_xs", "q3_k_m"]


class Setting(NamedTuple):
    """One file to measure: its format, its rows' type, and its matrix."""

    quant: QuantFormat
    rows: str
    matrix: str


def main() -> None:
    options = parse_options()
    torch.set_num_threads(options.threads)
    run = open_run(RUN_DIRECTORY)
    cases = held_out_cases(options.cases, options.spent)
    ids = [
        run.tokenizer.protocol.prompt_ids(c.conversation, c.policy, run.tokenizer.tokenize).ids
        for c in cases
    ]
    with tempfile.TemporaryDirectory() as scratch:
        merged = checked_weights(run)
        source, wide = write_quantizer_source(Path(scratch), run, merged)
        matrices = collected(run, merged, options.shares)
        reference = probabilities(source, ids, options.threads)
        print(f"n={len(cases)} dev cases, against {wide.label}\n")
        print(
            "| Format | Embedding rows | Matrix | MB | mean difference | largest | flips "
            "| refuse to allow |"
        )
        print("| --- | --- | --- | ---: | --- | ---: | --- | --- |")
        for setting in settings(options.formats, list(matrices), with_rows=options.rows):
            path = Path(scratch) / "quantized.gguf"
            quantize_gguf(
                source, path, setting.quant, options.threads, importance=matrices[setting.matrix]
            )
            stored = next(t for t in GGUFReader(path).tensors if t.name == "token_embd.weight")
            rows = f"{setting.rows} ({stored.tensor_type.name})"
            size = path.stat().st_size
            found = probabilities(path, ids, options.threads)
            print(line(setting, rows, size, reference, found), flush=True)
            path.unlink()


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", type=int, default=120)
    parser.add_argument("--spent", type=int, default=100, help="dev cases that chose the default")
    parser.add_argument("--formats", nargs="+", choices=DEFAULT_FORMATS, default=DEFAULT_FORMATS)
    parser.add_argument("--shares", nargs="*", type=float, default=[0.0, 0.5])
    parser.add_argument("--rows", action="store_true", help="other types of embedding rows too")
    parser.add_argument("--threads", type=int, default=1)
    return parser.parse_args()


def held_out_cases(n: int, spent: int) -> list[Case]:
    """``n`` dev cases without the sample of ``spent`` that the verdict share was chosen on."""
    cases = load_cases(DEFAULT_FILE)
    used = {case.id for case in stratified_sample(cases, spent, SPENT_SEED)} if spent else set()
    return stratified_sample([case for case in cases if case.id not in used], n, SAMPLE_SEED)


def collected(
    run: OpenRun, merged: Any, shares: Sequence[float]
) -> dict[str, ImportanceMatrix | None]:
    """No matrix, and one per verdict share, from the export's default cases."""
    cases = load_calibration(DEFAULT_IMPORTANCE_FILE, DEFAULT_IMPORTANCE_CASES, run.tokenizer)
    live = load_run(run.directory, load_in_8bit=False, device_map="cpu").model
    model = merged_model(live.base, dict(merged))
    del live
    matrices: dict[str, ImportanceMatrix | None] = {"none": None}
    for share in shares:
        name = f"verdict share {share:g}"
        matrices[name] = collect_importance(
            model, cases.whole_prompts, run.base.architecture, share
        )
    return matrices


def settings(formats: Sequence[str], matrices: list[str], *, with_rows: bool) -> Iterator[Setting]:
    """Every matrix with rows at Q8_0; the other rows without a matrix."""
    for name in formats:
        for matrix in matrices:
            yield Setting(FORMATS[name], "as exported", matrix)
        for rows, kind in OTHER_ROWS.items() if with_rows else ():
            yield Setting(FORMATS[name]._replace(rows_type=kind), rows, "none")


def probabilities(path: Path, ids: list[list[int]], threads: int) -> Probabilities:
    """Verdict probabilities (n, 3) of a file in llama.cpp, exact mode."""
    backend = LlamaCppBackend(path, threads=threads, exact=True)
    logits = np.zeros((len(ids), 3))
    for index, three in backend.score(ids):
        logits[index] = three
    backend.close()
    shares = np.exp(logits - logits.max(axis=1, keepdims=True))
    result: Probabilities = shares / shares.sum(axis=1, keepdims=True)
    return result


def line(
    setting: Setting, rows: str, size: int, reference: Probabilities, found: Probabilities
) -> str:
    """One line of the table."""
    apart = np.abs(found - reference).max(axis=1)
    mean = bootstrap(
        lambda chosen: apart[chosen].mean(axis=1), len(apart), np.random.default_rng(0)
    ).interval
    before, after = reference.argmax(axis=1), found.argmax(axis=1)
    unsafe = wilson(int(((before == 2) & (after == 0)).sum()), len(apart))
    return (
        f"| {setting.quant.label} | {rows} | {setting.matrix} | {size / 1e6:.1f} "
        f"| {mean.value:.4f} [{mean.low:.4f}, {mean.high:.4f}] | {apart.max():.3f} "
        f"| {directions(before, after)} "
        f"| {round((unsafe.value or 0) * len(apart))} [{unsafe.low:.3f}, {unsafe.high:.3f}] |"
    )


def directions(before: npt.NDArray[np.int_], after: npt.NDArray[np.int_]) -> str:
    """Flips by direction, the number of all first."""
    names = [verdict.value for verdict in SEVERITY_ORDER]
    parts = [
        f"{count} {names[a]}→{names[b]}"
        for a in range(3)
        for b in range(3)
        if a != b and (count := int(((before == a) & (after == b)).sum()))
    ]
    return f"{int((before != after).sum())}" + (f": {', '.join(parts)}" if parts else "")


if __name__ == "__main__":
    main()

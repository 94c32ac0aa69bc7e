"""Measure training, export and verdicts on a CUDA device; one JSON and one Markdown file.

    benchmarks/cuda_evidence.sh [--shapes 1b,7b,reference] [--bits 8,4] [--steps 8] [--work DIR]

For each shape and precision of the base: the plan's prediction, a fit of a few steps (memory of the
CUDA allocator, time), an export to Q8_0, and the verdict latency of PyTorch and llama.cpp on a
stratified sample of benchmarks/safety.jsonl. ``1b`` and ``7b`` are random Llamas made on the spot,
``reference`` is the reference configuration. Nothing is fetched from a network.

Each part runs in a process of its own and leaves a file under ``--work``. Started again with the
same options, this goes on: finished parts are kept, an interrupted fit or run of cases is resumed,
failed parts are tried again. Exit code 3 if a part failed.

Without CUDA it takes the same path on the CPU (by default with ``--shapes tiny``) and says so.
"""

import hashlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

import click

HERE: Final = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from cuda_evidence_parts import PARTS, Setting  # noqa: E402 - needs the path
from random_llama import SHAPES  # noqa: E402

from so8t_eval.atomic_write import atomic_write_text  # noqa: E402

RESULTS: Final = HERE / "results"
_TAIL: Final = 2000
"""Characters of a failed part's output that are kept."""


class Wanted(NamedTuple):
    """One part of the measurement and the file that holds what it found."""

    part: str
    setting: Setting
    file: Path


def default_shapes(cuda: bool) -> str:
    """What is measured unless asked."""
    return "1b,7b,reference" if cuda else "tiny"


def every_part(
    shapes: list[str], bits: list[int], options: dict[str, int], work: Path
) -> Iterator[Wanted]:
    """All parts in order; a change of ``options`` gives them other directories."""
    digest = hashlib.sha256(json.dumps(options, sort_keys=True).encode()).hexdigest()[:8]
    for shape in shapes:
        for precision in bits:
            directory = work / f"{shape}-{precision}bit-{digest}"
            setting = Setting(shape, precision, directory, work / "bases", **options)
            for part in PARTS:
                yield Wanted(part, setting, directory / f"{part}.json")


def measure(wanted: Wanted) -> dict[str, Any]:
    """What a part found, now or in an earlier run; ``error`` instead if it failed."""
    if wanted.file.is_file():
        kept: dict[str, Any] = json.loads(wanted.file.read_text(encoding="utf-8"))
        return kept
    wanted.setting.directory.mkdir(parents=True, exist_ok=True)
    request = wanted.setting.directory / "setting.json"
    atomic_write_text(request, json.dumps(wanted.setting._asdict(), default=str))
    command = [sys.executable, str(HERE / "cuda_evidence_parts.py"), wanted.part, str(request)]
    done = subprocess.run(
        [*command, str(wanted.file)],
        capture_output=True,
        text=True,
        check=False,
        cwd=wanted.setting.bases.parent,  # a run names its base relative to it
    )
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip())[-_TAIL:]
        return {"error": f"exit code {done.returncode}: {said}"}
    found: dict[str, Any] = json.loads(wanted.file.read_text(encoding="utf-8"))
    return found


def clean(setting: Setting) -> None:
    """Delete a shape's GGUF and checkpoints, which take gigabytes, once every part is done."""
    for name in ("gguf", "run/checkpoints"):
        shutil.rmtree(setting.directory / name, ignore_errors=True)


def numbers(_context: click.Context, _parameter: click.Parameter, text: str) -> list[int]:
    """8,4 as numbers."""
    names = [item.strip() for item in text.split(",")]
    if not names or any(name not in {"8", "4"} for name in names):
        raise click.BadParameter(f"expected 8, 4 or 8,4, found {text!r}")
    return [int(name) for name in names]


def shape_names(text: str) -> list[str]:
    """1b,reference as names."""
    names = [item.strip() for item in text.split(",")]
    known = [*SHAPES, "reference"]
    if unknown := [name for name in names if name not in known]:
        raise click.BadParameter(
            f"--shapes: expected names among {', '.join(known)}, found {', '.join(unknown)}"
        )
    return names


@click.command()
@click.option("--shapes", help="tiny, 1b, 7b, reference; comma-separated.")
@click.option("--bits", default="8,4", show_default=True, callback=numbers, help="Of the base.")
@click.option("--steps", default=8, show_default=True, type=click.IntRange(min=2))
@click.option("--cases", default=60, show_default=True, type=click.IntRange(min=3))
@click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0))
@click.option("--work", type=click.Path(path_type=Path), help="[default: so8t-runs/cuda-evidence]")
@click.option("--output", default=RESULTS, type=click.Path(path_type=Path), help="For the results.")
def main(  # noqa: PLR0917 - one for each option
    shapes: str | None,
    bits: list[int],
    steps: int,
    cases: int,
    seed: int,
    work: Path | None,
    output: Path,
) -> None:
    """Measure training, export and verdicts on a CUDA device."""
    from cuda_evidence_report import environment, write_results

    machine = environment()
    cuda = machine["cuda_device"] is not None
    if not cuda:
        click.echo("no CUDA device: the CPU path runs, and says nothing about CUDA", err=True)
    names = shape_names(shapes or default_shapes(cuda))
    options = {"steps": steps, "cases": cases, "seed": seed}
    place = (work or Path("so8t-runs") / "cuda-evidence").resolve()
    found: list[dict[str, Any]] = []
    for wanted in every_part(names, bits, options, place):
        label = f"{wanted.setting.shape} {wanted.setting.bits}-bit {wanted.part}"
        click.echo(f"{label}{' (kept)' if wanted.file.is_file() else ''}", err=True)
        result = measure(wanted)
        found.append(
            {
                "shape": wanted.setting.shape,
                "bits": wanted.setting.bits,
                "part": wanted.part,
                **result,
            }
        )
        if "error" in result:
            click.echo(f"{label} failed: {result['error'].splitlines()[-1]}", err=True)
        write_results(output, machine, options, found)
        if wanted.part == PARTS[-1] and "error" not in result:
            clean(wanted.setting)
    for file in write_results(output, machine, options, found):
        click.echo(file)
    sys.exit(3 if any("error" in result for result in found) else 0)


if __name__ == "__main__":
    main()

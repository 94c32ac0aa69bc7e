"""Time and peak memory of ``so8t-eval run`` by number of cases, and of what reads its records.

Run: python benchmarks/speed/scaling.py [--cases 100,1000,10000,100000] [--option=--deterministic …]

The memory of a run must not grow with its cases. The model is a tiny random GGUF, so that a run's
own costs (reading, rendering, tokenizing, writing and summarising) are what is seen. Cases are
generated, no two alike, about 20 to 80 characters of text each. ``report``, ``compare`` and ``gate``
then read the run and a copy of its records in which every tenth verdict is another; they hold
records in memory. Every command is a process of its own whose peak resident set and processor time
the system counts (Linux and macOS); on a shared machine the processor time is what counts. Prints
Markdown tables; writes nothing that stays.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from support.tiny_gguf import write_tiny_gguf  # noqa: E402 - found through the path above

VERDICTS = ("allow", "escalate", "refuse")
WORDS = (ROOT / "README.md").read_text(encoding="utf-8").split()
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # bytes of one unit of ru_maxrss


class Measured(NamedTuple):
    """What one command took."""

    wall_s: float
    cpu_s: float
    peak_mib: float

    def row(self, *cells: str) -> str:
        """Return a table row that begins with these cells."""
        shown = (*cells, f"{self.wall_s:.1f} s", f"{self.cpu_s:.1f} s", f"{self.peak_mib:.0f} MiB")
        return f"| {' | '.join(shown)} |"


def case_lines(n: int) -> Iterator[str]:
    """Yield ``n`` different cases; the first lines do not depend on ``n``."""
    rng = random.Random(0)  # noqa: S311 - texts, not secrets
    for i in range(n):
        text = " ".join(rng.choices(WORDS, k=rng.randint(3, 12)))
        case = {
            "id": f"generated-{i:07d}",
            "prompt": f"{i} {text}",
            "verdict": VERDICTS[i % 3],
            "category": f"made/{i % 30}",
            "lang": "en",
            "tags": ["twin"] if i % 5 == 0 else [],
        }
        yield json.dumps(case) + "\n"


def write_cases(path: Path, n: int) -> Path:
    """Write ``n`` cases to a file."""
    with path.open("w", encoding="utf-8") as stream:
        stream.writelines(case_lines(n))
    return path


def write_changed(records: Path, target: Path) -> Path:
    """Copy records as another model's that turns every tenth verdict into the next one."""
    with records.open(encoding="utf-8") as source, target.open("w", encoding="utf-8") as stream:
        for number, line in enumerate(source):
            record = json.loads(line) | {"model_sha256": "f" * 64}
            if number % 10 == 0:
                turn = dict(zip(VERDICTS, (*VERDICTS[1:], VERDICTS[0]), strict=True))
                record["verdict"] = turn[record["verdict"]]
                for scores in ("probabilities", "logits"):
                    record[scores] = {turn[name]: x for name, x in record[scores].items()}
            stream.write(json.dumps(record) + "\n")
    return target


def measure(*words: str | Path, allowed: tuple[int, ...] = (0,)) -> Measured:
    """Run ``so8t-eval`` in a process of its own.

    Raises:
        SystemExit: it ended with another exit code; with what it said.
    """
    command = [sys.executable, "-m", "so8t_eval.cli", *map(str, words)]
    started = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode not in allowed:
            log.seek(0)
            said = log.read().decode("utf-8", "replace")[-2000:]
            raise SystemExit(f"{' '.join(command)}: exit code {process.returncode}\n{said}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Measured(wall_s, cpu_s, usage.ru_maxrss * RSS_UNIT / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="100,1000,10000,100000", help="sizes, by comma")
    parser.add_argument("--option", action="append", default=[], help="for so8t-eval run")
    options = parser.parse_args()
    sizes = [int(size) for size in options.cases.split(",")]
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        print_runs(sizes, directory, options.option)
        print_readers(sizes, directory)


def print_runs(sizes: list[int], directory: Path, options: list[str]) -> None:
    print(
        "| Cases | Time | Processor | Peak RSS | Growth per further case |\n"
        "| ---: | ---: | ---: | ---: | ---: |"
    )
    model = write_tiny_gguf(directory / "tiny.gguf", seed=1)
    before: tuple[int, Measured] | None = None
    for n in sizes:
        cases = write_cases(directory / f"{n}.jsonl", n)
        log_dir = directory / f"run-{n}"
        now = measure("run", cases, "--model", f"llamacpp:{model}", "--log-dir", log_dir, *options)
        growth = "" if before is None else bytes_per_case(before, (n, now))
        print(f"{now.row(f'{n:,}')} {growth} |", flush=True)
        before = n, now


def print_readers(sizes: list[int], directory: Path) -> None:
    print(
        "\n| Command | Cases | Time | Processor | Peak RSS | Files |\n"
        "| --- | ---: | ---: | ---: | ---: | --- |"
    )
    for n in sizes:
        run = directory / f"run-{n}"
        changed = write_changed(run / "records.jsonl", directory / f"changed-{n}.jsonl")
        policy = (
            "--policy",
            ROOT / "benchmarks" / "policy.toml",
            "--cases",
            directory / f"{n}.jsonl",
        )
        html, md, xml, sarif = (
            directory / f"report.{end}" for end in ("html", "md", "xml", "sarif")
        )
        took = measure("report", run, "-o", html)
        print(f"{took.row('report, one run', f'{n:,}')} {sizes_of(html)} |", flush=True)
        took = measure("report", run, changed, "-o", html, "--markdown", md)
        print(f"{took.row('report, two runs', f'{n:,}')} {sizes_of(html, md)} |", flush=True)
        took = measure("compare", run, changed)
        print(f"{took.row('compare', f'{n:,}')} |", flush=True)
        outputs = ("-o", xml, "-o", sarif)
        took = measure("gate", changed, "--baseline", run, *policy, *outputs, allowed=(0, 1, 4))
        print(f"{took.row('gate', f'{n:,}')} {sizes_of(xml, sarif)} |", flush=True)


def sizes_of(*paths: Path) -> str:
    """Return the sizes of files by the ends of their names, for the table."""
    return ", ".join(f"{path.suffix} {path.stat().st_size / 1e6:.1f} MB" for path in paths)


def bytes_per_case(before: tuple[int, Measured], now: tuple[int, Measured]) -> str:
    """Return how much memory each further case took, for the table."""
    grown = (now[1].peak_mib - before[1].peak_mib) * 2**20
    return f"{grown / (now[0] - before[0]):.0f} B"


if __name__ == "__main__":
    main()

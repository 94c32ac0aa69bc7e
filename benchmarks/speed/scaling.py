"""Time and peak memory of ``so8t-eval run`` by number of cases: memory must not grow with them.

Run: python benchmarks/speed/scaling.py [--cases 100,1000,10000,100000] [--option=--deterministic …]

The model is a tiny random GGUF, so that a run's own costs (reading, rendering, tokenizing, writing
and summarising) are what is seen. Cases are generated, no two alike, about 20 to 80 characters of
text each. Every size is a process of its own whose peak resident set the system counts (Linux and
macOS). Prints a Markdown table; writes nothing that stays.
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
    """What one run took."""

    wall_s: float
    peak_mib: float


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


def measure(n: int, model: Path, directory: Path, options: list[str]) -> Measured:
    """Run ``n`` cases in a process of its own.

    Raises:
        SystemExit: the run failed; with what it said.
    """
    cases = directory / f"{n}.jsonl"
    with cases.open("w", encoding="utf-8") as stream:
        stream.writelines(case_lines(n))
    command = [sys.executable, "-m", "so8t_eval.cli", "run", str(cases)]
    command += ["--model", f"llamacpp:{model}", "--log-dir", str(directory / f"run-{n}"), *options]
    output = directory / f"{n}.log"
    started = time.perf_counter()
    with output.open("wb") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        _, status, usage = os.wait4(process.pid, 0)
    wall_s = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{n} cases: exit code {process.returncode}\n{output.read_text()[-2000:]}")
    return Measured(wall_s, usage.ru_maxrss * RSS_UNIT / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--cases", default="100,1000,10000,100000", help="sizes, by comma")
    parser.add_argument("--option", action="append", default=[], help="for so8t-eval run")
    options = parser.parse_args()
    print("| Cases | Time | Cases/s | Peak RSS | Growth per further case |")
    print("| ---: | ---: | ---: | ---: | ---: |")
    before: tuple[int, Measured] | None = None
    with tempfile.TemporaryDirectory() as scratch:
        model = write_tiny_gguf(Path(scratch) / "tiny.gguf", seed=1)
        for n in map(int, options.cases.split(",")):
            now = measure(n, model, Path(scratch), options.option)
            growth = "" if before is None else bytes_per_case(before, (n, now))
            print(
                f"| {n:,} | {now.wall_s:.1f} s | {n / now.wall_s:.0f} | {now.peak_mib:.0f} MiB | "
                f"{growth} |",
                flush=True,
            )
            before = n, now


def bytes_per_case(before: tuple[int, Measured], now: tuple[int, Measured]) -> str:
    """Return how much memory each further case took, for the table."""
    grown = (now[1].peak_mib - before[1].peak_mib) * 2**20
    return f"{grown / (now[0] - before[0]):.0f} B"


if __name__ == "__main__":
    main()

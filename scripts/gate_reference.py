"""Judge a sample of the benchmark with the reference model and gate it against the baseline.

    python scripts/gate_reference.py           exit code of so8t-eval gate
    python scripts/gate_reference.py --make    write benchmarks/baseline anew

Every case is computed alone (--deterministic), so on one machine the figures are the same bits each
time; on another, other CPU kernels may decide near ties otherwise, for which the policy has room.
``--model`` judges another model.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = ROOT / "benchmarks" / "safety.jsonl"
BASELINE = ROOT / "benchmarks" / "baseline"
N_CASES, SEED = 150, 0
KEPT = ("records.jsonl", "summary.json")


def main(arguments: Sequence[str]) -> int:
    """Gate, or make the baseline; return the exit code of the first command that ended with one."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--make", action="store_true", help="write the baseline instead")
    parser.add_argument("--model", help="model, as for so8t-eval run (default: the reference's)")
    parser.add_argument("--baseline", type=Path, default=BASELINE, metavar="DIR")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        run = Path(scratch) / "run"
        if code := judge(options.model or reference(), run):
            return code
        if not options.make:
            policy = BASELINE / "policy.toml"
            return so8t_eval("gate", run, "--baseline", options.baseline, "--policy", policy)
        options.baseline.mkdir(parents=True, exist_ok=True)
        for name in KEPT:
            shutil.copy(run / name, options.baseline / name)
    return 0


def reference() -> str:
    """Return the reference model's GGUF, which is built on first use."""
    from so8t_eval.backends.registry import reference_models

    return next(str(spec) for spec in reference_models(print) if spec.prefix == "llamacpp")


def judge(model: str, run: Path) -> int:
    """Judge the sample into ``run``."""
    sample = ["--limit", N_CASES, "--seed", SEED, "--deterministic", "--latency-cases", 0]
    return so8t_eval("run", CASES.relative_to(ROOT), "--model", model, *sample, "--log-dir", run)


def so8t_eval(*arguments: object) -> int:
    """Run a command of so8t-eval in the repository and return its exit code."""
    command = [sys.executable, "-m", "so8t_eval.cli", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

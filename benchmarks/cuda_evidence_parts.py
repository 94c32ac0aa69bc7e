"""The parts of ``cuda_evidence.py``, each run in a process of its own.

Run: python benchmarks/cuda_evidence_parts.py PART SETTING.json RESULT.json
"""

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

HERE: Final = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from random_llama import SHAPES, is_finished, write_base  # noqa: E402 - needs the path

from so8t_eval.atomic_write import atomic_write_text  # noqa: E402

GIB: Final = float(1 << 30)
REFERENCE: Final = HERE.parent / "so8t_train" / "reference" / "fit.yaml"
CASES: Final = HERE / "safety.jsonl"
LATENCY_CASES: Final = 30


class Setting(NamedTuple):
    """What is measured, and where its files go."""

    shape: str
    bits: int
    directory: Path
    bases: Path
    steps: int
    cases: int
    seed: int

    @property
    def run(self) -> Path:
        """The run directory that the fit writes."""
        return self.directory / "run"


def configuration(setting: Setting) -> Path:
    """Write the fit's YAML; makes the random base if there is none yet."""
    import torch
    import yaml

    from so8t_train.config import load_config

    shipped = load_config(REFERENCE)
    values = yaml.safe_load(REFERENCE.read_text(encoding="utf-8"))
    values |= {
        "train_file": [str(file) for file in shipped.train_file],
        "dev_file": [str(file) for file in shipped.dev_file],
        "output_dir": str(setting.run.resolve()),
        "load_in_8bit": setting.bits == 8,
        "load_in_4bit": setting.bits == 4,
        "device_map": "cuda" if torch.cuda.is_available() else "cpu",
        "max_steps": setting.steps,
        "num_epochs": 1.0,
        "seed": setting.seed,
    }
    if setting.shape != "reference":
        base = setting.bases / f"{setting.shape}-{setting.seed}"
        if not is_finished(base):
            shutil.rmtree(base, ignore_errors=True)
            write_base(base, SHAPES[setting.shape], setting.seed)
        values |= {
            "base_model": str(base.resolve()),
            "dev_file": [],
            "micro_batch_size": 1,
            "gradient_accumulation_steps": 8,
            "gradient_checkpointing": True,
            "max_length": 1024,
        }
    if setting.shape == "tiny":  # only shows that the path works: a step is to take no time
        values |= {"max_length": 192, "threads": 1}
    path = setting.directory / "fit.yaml"
    atomic_write_text(path, yaml.safe_dump(values))
    return path


def plan(setting: Setting) -> dict[str, Any]:
    """What ``so8t-train plan`` predicts; GiB."""
    said = _command(
        "so8t_train.cli", "plan", str(configuration(setting)), "--json", codes=(0, 2, 4)
    )
    facts = json.loads(said)
    return {
        "fit": facts["fit"],
        "device": facts["device"],
        "dtype": facts["dtype"],
        "peak_gib": facts["peak"] / GIB,
        "available_gib": facts["available"] / GIB,
        "parameters": facts["parameters"],
    }


def fit(setting: Setting) -> dict[str, Any]:
    """Train a few steps in this process; memory and time as measured.

    ``peak_*`` are of this process: of the steps after the interruption if there was one.
    """
    import torch

    from so8t_train.config import load_config
    from so8t_train.fit import MEMORY_LOG, TRAIN_LOG, FitReporter
    from so8t_train.fit import fit as run_fit
    from so8t_train.phase_peaks import resident_peak

    reporter = FitReporter(lambda news: print(news, flush=True), lambda _report, _memory: None)
    run_fit(load_config(configuration(setting)), resume="auto", reporter=reporter)
    steps, memory = (_lines(setting.run / name) for name in (TRAIN_LOG, MEMORY_LOG))
    timed = steps[1:]  # the first step compiles and allocates
    found: dict[str, Any] = {
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "steps": len(steps),
        "sessions": len({step.get("session") for step in steps}),
        "step_s_median": statistics.median(step["step_s"] for step in timed),
        "step_s_each": [step["step_s"] for step in steps],
        "tokens_per_s": sum(s["tokens"] for s in timed) / sum(s["step_s"] for s in timed),
        "allocated_gib": memory[-1]["allocated_gib"],
        "reserved_gib": memory[-1]["reserved_gib"],
        "loss_first": steps[0]["loss"],
        "loss_last": steps[-1]["loss"],
        "peak_resident_gib": resident_peak() / GIB,
        "peak_allocated_gib": None,
        "peak_reserved_gib": None,
    }
    if torch.cuda.is_available():
        found["peak_allocated_gib"] = torch.cuda.max_memory_allocated() / GIB
        found["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / GIB
    return found


def export(setting: Setting) -> dict[str, Any]:
    """Export to Q8_0; the reference is certified by running it, random models by their weights.

    Nobody asks whether quantization moves a random model's verdicts.
    """
    level = "full" if setting.shape == "reference" else "weights"
    target = setting.directory / "gguf"
    started = time.monotonic()
    if not (target / "certificate.json").is_file():
        options = ["-o", str(target), "--quant", "q8_0", "--certificate", level]
        _command("so8t_train.cli", "export", str(setting.run), *options)
    certificate = json.loads((target / "certificate.json").read_text(encoding="utf-8"))
    return {
        "seconds": time.monotonic() - started,
        "level": certificate["level"],
        "passed": certificate["passed"],
        "merge_base": certificate["merge_base"],
        "bytes": sum(file["bytes"] for file in certificate["files"] if file["kept"]),
    }


def verdicts(setting: Setting) -> dict[str, Any]:
    """Latency of one verdict at a time, and throughput, in PyTorch and llama.cpp."""
    import torch

    logs = setting.directory / "verdicts"
    gguf = next((setting.directory / "gguf").glob("*-Q8_0.gguf"), None)
    judged = (logs / "summary.json").is_file()
    if gguf is None and not judged:
        raise SystemExit("no exported file to judge with: the export failed")
    options = ["--limit", str(setting.cases), "--seed", str(setting.seed)]
    options += ["--latency-cases", str(min(LATENCY_CASES, setting.cases)), "--log-dir", str(logs)]
    if torch.cuda.is_available():
        options += ["--torch-dtype", "bfloat16"]
    if (logs / "records.jsonl").is_file():
        options.append("--resume")
    models = ["--model", f"torch:{setting.run}", "--model", f"llamacpp:{gguf}"]
    if not judged:
        _command("so8t_eval.cli", "run", str(CASES), *models, *options)
    summary = json.loads((logs / "summary.json").read_text(encoding="utf-8"))
    return {
        "n": summary["cases"]["n"],
        "latency_n": min(LATENCY_CASES, setting.cases),
        "machine": summary["machine"],
        "versions": summary["versions"],
        "runs": [
            {
                "backend": run["backend"],
                "latency_ms": run["latency_ms"],
                "cases_per_s": run["cases_per_s"],
                "errors": len(run["errors"]),
                "settings": run["settings"],
            }
            for run in summary["runs"]
        ],
    }


_PARTS: Final[dict[str, Callable[[Setting], dict[str, Any]]]] = {
    "plan": plan,
    "fit": fit,
    "export": export,
    "verdicts": verdicts,
}
PARTS: Final = tuple(_PARTS)


def _command(module: str, *arguments: str, codes: tuple[int, ...] = (0,)) -> str:
    """Standard output of one of SO8T's commands.

    Raises:
        SystemExit: it failed; with what it said.
    """
    command = [sys.executable, "-m", module, *arguments]
    paths = [str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode not in codes:
        raise SystemExit(f"{module} {arguments[0]}: exit code {done.returncode}\n{done.stderr}")
    return done.stdout


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    name, request, answer = sys.argv[1:]
    raw = json.loads(Path(request).read_text(encoding="utf-8"))
    asked = Setting(**raw | {key: Path(raw[key]) for key in ("directory", "bases")})
    atomic_write_text(Path(answer), json.dumps(_PARTS[name](asked), indent=1) + "\n")

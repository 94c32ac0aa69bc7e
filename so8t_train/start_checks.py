"""What can be told of a fit before its base is loaded: errors that would cost minutes later."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import torch

from so8t_eval.atomic_write import check_writable
from so8t_eval.errors import ConfigError, DiskError
from so8t_train.config import FitConfig
from so8t_train.file_lock import held_lock
from so8t_train.model_shape import ModelShape
from so8t_train.so8_rotation import BLOCK_SIZE

LOCK: Final = "fit.lock"


def check_device(config: FitConfig) -> None:
    """Refuse ``device_map: cuda`` where there is none.

    Raises:
        ConfigError: saying whether it is torch or the machine that lacks it.
    """
    if config.device_map == "cuda" and not torch.cuda.is_available():
        why = "no CUDA device was found" if torch.version.cuda else "this torch is built for CPUs"
        raise ConfigError(
            f"device_map: expected auto or cpu here, found cuda; {why} (so8t-train doctor shows more)"
        )


def check_shape(config: FitConfig, shape: ModelShape) -> None:
    """Compare the configuration with the sizes of the base model.

    Raises:
        ConfigError: LoRA is to go on layers that the base does not have, or a gate does not fit.
    """
    if config.lora_target_modules != "all-linear":
        there = list(dict.fromkeys(linear.name for linear in shape.linears))
        wrong = [n for n in config.lora_target_modules if n.rpartition(".")[2] not in there]
        if wrong:
            raise ConfigError(
                f"lora_target_modules: expected some of {', '.join(there)}, found "
                f"{', '.join(wrong)}; correct the names, or write all-linear"
            )
    if config.rotation_gates and shape.hidden % BLOCK_SIZE:
        raise ConfigError(
            f"base_model: expected a model whose hidden size is divisible by {BLOCK_SIZE}, found "
            f"{shape.hidden}; choose another base model, or set rotation_gates: false"
        )


@contextlib.contextmanager
def sole_fit(directory: Path) -> Iterator[None]:
    """Hold a run directory, so that no other fit writes there; the system frees it at a kill.

    Raises:
        ConfigError: another fit holds it, or it is a file.
        DiskError: it cannot be written.
    """
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"output_dir: {directory} is a file; choose another output_dir")
    existed = directory.is_dir()
    busy = ConfigError(
        f"output_dir: another fit is writing {directory}; wait for it, or choose another output_dir"
    )
    try:
        check_writable(directory / LOCK)
        lock = held_lock(directory / LOCK, busy)
    except DiskError as error:
        raise DiskError(f"output_dir: {error}; choose another output_dir") from error
    except OSError as error:
        raise DiskError(
            f"output_dir: cannot write {directory}: {error.strerror or error}; choose another "
            "output_dir"
        ) from error
    try:
        yield
    finally:
        lock.release()
        with contextlib.suppress(OSError):  # held again already, or open elsewhere on Windows
            (directory / LOCK).unlink(missing_ok=True)
        if not existed:
            with contextlib.suppress(OSError):  # not empty
                directory.rmdir()

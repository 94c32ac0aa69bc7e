"""The run directory: what training leaves behind, written with hashes, loaded whole or refused."""

import json
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from so8t_eval.atomic_write import atomic_path, atomic_write_text
from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.errors import ConfigError, DiskError, ModelFileError
from so8t_eval.file_hash import file_sha256
from so8t_train.base_model import BaseModelSource, resolve_base
from so8t_train.base_name import portable_name
from so8t_train.config import FitConfig, MergeBase
from so8t_train.operating_points import OperatingPoint
from so8t_train.safety_model import GateTensors, SafetyModel, build_safety_model

FORMAT_VERSION: Final = 1
MANIFEST: Final = "so8t.json"
SAFETY_TENSORS: Final = "so8t.safetensors"
ADAPTER_CONFIG: Final = "adapter_config.json"
ADAPTER_TENSORS: Final = "adapter_model.safetensors"
PARTS: Final = (MANIFEST, SAFETY_TENSORS, ADAPTER_CONFIG, ADAPTER_TENSORS)
_PACKAGES: Final = ("so8t", "torch", "transformers", "peft", "bitsandbytes", "tokenizers", "gguf")


class RunManifest(BaseModel):
    """``so8t.json``: what was trained, from what, with which result."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: int
    protocol_hash: str
    base_model: str
    base_sha256: str
    temperature: float
    operating_points: dict[str, OperatingPoint] = {}
    """By name; empty for a run without a dev split."""
    sha256: dict[str, str]
    """Hash of every other part, by file name."""
    config: FitConfig
    versions: dict[str, str]
    platform: str
    training: dict[str, Any]
    """Steps, cases, wall time, dev results: what the model card shows."""


class LoadedRun(NamedTuple):
    """A run directory in memory: the live model with gates, its tokenizer and manifest."""

    model: SafetyModel
    tokenizer: HfTokenizer
    manifest: RunManifest
    source: BaseModelSource


def save_run(  # noqa: PLR0917 - everything a run consists of
    directory: Path,
    model: SafetyModel,
    tokenizer: HfTokenizer,
    source: BaseModelSource,
    config: FitConfig,
    training: dict[str, Any],
    points: dict[str, OperatingPoint] | None = None,
) -> RunManifest:
    """Write all parts; the manifest, which makes the run valid, goes last.

    Raises:
        DiskError: a part could not be written.
    """
    import peft

    lora_dtype = getattr(torch, config.adapter_dtype)
    # Without the flag PEFT asks the hub whether the base's vocabulary was resized.
    state: dict[str, Tensor] = peft.get_peft_model_state_dict(
        model.causal_lm, save_embedding_layers=False
    )
    _save(directory / ADAPTER_TENSORS, {k: v.to(lora_dtype) for k, v in state.items()})
    base = portable_name(source.name)
    atomic_write_text(directory / ADAPTER_CONFIG, _adapter_config(model, base))
    _save(directory / SAFETY_TENSORS, safety_tensors(model))
    manifest = RunManifest(
        format_version=FORMAT_VERSION,
        protocol_hash=tokenizer.protocol.hash,
        base_model=base,
        base_sha256=source.sha256,
        temperature=model.temperature,
        operating_points=points or {},
        sha256={name: file_sha256(directory / name) for name in PARTS if name != MANIFEST},
        config=_without_paths(config).model_copy(update={"base_model": base}),
        versions=package_versions(),
        platform=f"{platform.system()} {platform.machine()}, Python {platform.python_version()}",
        training=training,
    )
    text = manifest.model_dump_json(indent=2)
    atomic_write_text(directory / MANIFEST, text + "\n")
    return manifest


def read_manifest(directory: Path) -> RunManifest:
    """Check that every part is present, unchanged and of this format, and read the manifest.

    Raises:
        ModelFileError: naming the part that is missing, altered or of another version.
    """
    if not directory.is_dir():
        raise ModelFileError(
            f"{directory} is not a directory; give a run directory of so8t-train fit"
        )
    if not (directory / MANIFEST).is_file() and any((directory / "checkpoints").glob("step-*")):
        raise ModelFileError(
            f"{directory} holds an interrupted fit; finish it with so8t-train fit CONFIG --resume"
        )
    missing = [name for name in PARTS if not (directory / name).is_file()]
    if missing:
        raise ModelFileError(
            f"{directory} is not a complete run: missing {', '.join(missing)}. Without one of "
            f"{', '.join(PARTS)} it would answer without its safety head, so it is not loaded; "
            "train again or copy the whole directory"
        )
    try:
        raw = json.loads((directory / MANIFEST).read_text(encoding="utf-8"))
        if isinstance(raw, dict) and raw.get("format_version") != FORMAT_VERSION:
            raise ModelFileError(
                f"{directory / MANIFEST}: expected format_version {FORMAT_VERSION}, found "
                f"{raw.get('format_version')!r}; use the SO8T version that wrote it, or train again"
            )
        manifest = RunManifest.model_validate(raw)
    except (ValueError, ValidationError) as error:
        raise ModelFileError(f"{directory / MANIFEST} cannot be read: {error}") from error
    if set(manifest.sha256) != set(PARTS) - {MANIFEST}:
        raise ModelFileError(
            f"{directory / MANIFEST}: expected sha256 of every part, found "
            f"{sorted(manifest.sha256)}; restore the file or train again"
        )
    for name, expected in manifest.sha256.items():
        found = file_sha256(directory / name)
        if found != expected:
            raise ModelFileError(
                f"{directory / name} was altered after training (expected sha256 {expected[:12]}…, "
                f"found {found[:12]}…); restore the file or train again"
            )
    return manifest


def run_base(directory: Path, manifest: RunManifest) -> BaseModelSource:
    """The base model that a run was trained on.

    A relative path is looked for in the working directory, then in those above the run.

    Raises:
        ModelFileError: it is not there, incomplete, or another than the run was trained on.
    """
    name = manifest.base_model
    above = [parent / name for parent in directory.resolve().parents]
    try:
        source = resolve_base(name)
    except ConfigError as error:
        found = next((path for path in above if path.exists()), None)
        if found is None:
            raise ModelFileError(
                f"{directory} was trained on the base model {name!r}, which is neither in the working "
                "directory nor in one above the run; start where it was trained, or put the base there"
            ) from error
        source = resolve_base(str(found))._replace(name=name)
    if source.sha256 != manifest.base_sha256:
        raise ModelFileError(
            f"{source.path}: expected the base that {directory} was trained on (sha256 "
            f"{manifest.base_sha256[:12]}…), found {source.sha256[:12]}…; use the original files"
        )
    return source


def load_run(
    directory: Path,
    *,
    dtype: torch.dtype = torch.float32,
    merge_base: MergeBase | None = None,
    device_map: Literal["auto", "cpu", "cuda"] | None = None,
) -> LoadedRun:
    """Load the live model; base weights and place are as in training, unless the caller says so.

    Raises:
        ModelFileError: an incomplete or altered run, another base, or another protocol.
    """
    manifest = read_manifest(directory)
    source = run_base(directory, manifest)
    updates: dict[str, Any] = {"lora_dropout": 0.0}
    if merge_base is not None:
        updates |= {
            "load_in_8bit": merge_base == "dequant8",
            "load_in_4bit": merge_base == "dequant4",
        }
    if device_map is not None:
        updates["device_map"] = device_map
    config = manifest.config.model_copy(update=updates)
    model, tokenizer = build_safety_model(source, config, dtype)
    if tokenizer.protocol.hash != manifest.protocol_hash:
        raise ModelFileError(
            f"{directory} was trained with another verdict protocol (hash "
            f"{manifest.protocol_hash[:12]}…, this version makes {tokenizer.protocol.hash[:12]}…); "
            "use the SO8T version that trained it, or train again"
        )
    load_parts(directory, model)
    model.temperature = manifest.temperature
    return LoadedRun(model.eval(), tokenizer, manifest, source)


def safety_tensors(model: SafetyModel) -> dict[str, Tensor]:
    """Content of ``so8t.safetensors``, float32: verdict rows, generators (layers, blocks, 28)."""
    tensors = {"verdict_rows": model.verdict_rows.detach().cpu().clone()}
    if model.verdict_input_rows is not None:
        tensors["verdict_input_rows"] = model.verdict_input_rows.detach().cpu().clone()
    gates = model.gate_tensors()
    if gates is not None:
        tensors |= {"safe_generators": gates.safe, "command_generators": gates.command}
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read a safetensors file.

    Raises:
        ModelFileError: broken or truncated.
    """
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError) as error:
        raise ModelFileError(
            f"{path} is broken or truncated ({error}); restore the file"
        ) from error
    return tensors


def package_versions() -> dict[str, str]:
    """Installed versions of the packages that shape a result."""
    versions: dict[str, str] = {}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    return versions


def _without_paths(config: FitConfig) -> FitConfig:
    """File names alone: a run is copied and published, and other machines have other folders."""
    return config.model_copy(
        update={
            "train_file": tuple(Path(file.name) for file in config.train_file),
            "dev_file": tuple(Path(file.name) for file in config.dev_file),
            "replay_file": tuple(Path(file.name) for file in config.replay_file),
            "output_dir": Path(config.output_dir.name),
            "offload_folder": None,
            "init_from": Path(config.init_from.name) if config.init_from else None,
        }
    )


def load_parts(directory: Path, model: SafetyModel) -> None:
    """Copy LoRA, verdict rows and rotations of a run into a model of the same shape.

    Raises:
        ModelFileError: a part is broken or of another shape.
    """
    import peft

    adapter = {k: v.float() for k, v in read_tensors(directory / ADAPTER_TENSORS).items()}
    try:
        result = peft.set_peft_model_state_dict(model.causal_lm, adapter)
    except RuntimeError as error:  # torch's word for tensors of another shape
        raise ModelFileError(
            f"{directory / ADAPTER_TENSORS} does not fit the base model and lora_r of the run: "
            f"{error}"
        ) from error
    lora_missing = [key for key in result.missing_keys if "lora_" in key]
    if lora_missing or result.unexpected_keys:
        raise ModelFileError(
            f"{directory / ADAPTER_TENSORS} does not fit the base model: "
            f"{len(lora_missing)} tensors missing, {len(result.unexpected_keys)} unexpected"
        )
    tensors = read_tensors(directory / SAFETY_TENSORS)
    wanted = safety_tensors(model)
    if {k: v.shape for k, v in wanted.items()} != {k: v.shape for k, v in tensors.items()}:
        raise ModelFileError(
            f"{directory / SAFETY_TENSORS}: expected tensors "
            f"{ {k: tuple(v.shape) for k, v in wanted.items()} }, found "
            f"{ {k: tuple(v.shape) for k, v in tensors.items()} }"
        )
    with torch.no_grad():
        model.verdict_rows.copy_(tensors["verdict_rows"])
        if model.verdict_input_rows is not None:
            model.verdict_input_rows.copy_(tensors["verdict_input_rows"])
    if model.gates:
        model.load_gate_tensors(
            GateTensors(tensors["safe_generators"], tensors["command_generators"])
        )


def _adapter_config(model: SafetyModel, base: str) -> str:
    causal_lm: Any = model.causal_lm
    config = causal_lm.peft_config["default"].to_dict()
    config |= {"base_model_name_or_path": base, "inference_mode": True}
    for key, value in config.items():
        if isinstance(value, set):
            config[key] = sorted(value)
    return json.dumps(config, indent=2, sort_keys=True, default=str) + "\n"


def _save(path: Path, tensors: dict[str, Tensor]) -> None:
    with atomic_path(path) as temporary:
        try:
            save_file({k: v.detach().cpu().contiguous() for k, v in tensors.items()}, temporary)
        except SafetensorError as error:  # how safetensors reports a full disk
            raise DiskError(f"cannot write {path}: {error}") from error

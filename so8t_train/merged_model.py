"""From a run directory to an ordinary model's weights: LoRA merged, gates folded, rows added."""

import hashlib
import json
import math
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.errors import ExportError, ModelFileError
from so8t_train.base_model import load_tokenizer
from so8t_train.base_weights import (
    EMBEDDING,
    OUTPUT,
    BaseWeights,
    linear_names,
    read_base_weights,
)
from so8t_train.config import FourBit, MergeBase
from so8t_train.families import FAMILIES
from so8t_train.fold import LoraPair, calibrated_rows, composed_rotations, folded_rows
from so8t_train.gate_installation import ATTENTION_NAMES, LAYER_LIST_NAMES, PROJECTION_NAMES
from so8t_train.gguf_tokenizer import tokenizer_from_gguf
from so8t_train.lazy_weights import LazyWeights
from so8t_train.quantized_layers import dequant4, dequant8
from so8t_train.run_dir import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    MANIFEST,
    SAFETY_TENSORS,
    RunManifest,
    read_manifest,
    read_tensors,
    run_base,
)
from so8t_train.safety_model import GateTensors

_LORA_KEY: Final = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_GATED: Final = re.compile(
    rf".*\b(?:{'|'.join(LAYER_LIST_NAMES)})\.(\d+)\."
    rf"(?:{'|'.join(ATTENTION_NAMES)})\.(?:{'|'.join(PROJECTION_NAMES)})"
)
_UNSUPPORTED: Final = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias")


class Adapter(NamedTuple):
    """What training left: LoRA factors by module name with their scale, generators, verdict rows.

    ``verdict_input_rows`` is None for tied embeddings, ``gates`` for runs without gates.
    """

    lora: dict[str, LoraPair]
    scale: float
    gates: GateTensors | None
    verdict_rows: Tensor
    verdict_input_rows: Tensor | None


class OpenRun(NamedTuple):
    """A verified run: its adapter in memory, its base open."""

    directory: Path
    manifest: RunManifest
    base: BaseWeights
    adapter: Adapter
    tokenizer: HfTokenizer

    @property
    def verdict_ids(self) -> tuple[int, int, int]:
        """Ids of the verdict tokens in severity order."""
        first = self.base.vocab_size
        return first, first + 1, first + 2

    @property
    def adapter_sha256(self) -> str:
        """SHA-256 (hex) over names and hashes of all parts: LoRA, its config, gates and rows."""
        digest = hashlib.sha256()
        for name, part in sorted(self.manifest.sha256.items()):
            digest.update(f"{name}\0{part}\0".encode())
        return digest.hexdigest()

    @property
    def gated_modules(self) -> list[str]:
        """Names of the attention output projections in layer order; empty without gates."""
        return gated_modules(self.base) if self.adapter.gates is not None else []


def open_run(directory: Path) -> OpenRun:
    """Verify every part of a run by hash and read it, with its base model.

    Raises:
        ModelFileError: a part or the base is missing or altered, naming the file.
        ExportError: the adapter does not fit the base.
    """
    manifest = read_manifest(directory)
    source = run_base(directory, manifest)
    base = read_base_weights(source)
    tokenizer = load_tokenizer(source) if base.reader is None else tokenizer_from_gguf(base.reader)
    if tokenizer.protocol.hash != manifest.protocol_hash:
        raise ModelFileError(
            f"{directory}: expected verdict protocol {manifest.protocol_hash[:12]}…, found "
            f"{tokenizer.protocol.hash[:12]}…; use the SO8T version that trained it"
        )
    adapter = _read_adapter(directory)
    _check_fit(directory, base, adapter)
    _check_temperature(directory, base, manifest.temperature)
    return OpenRun(directory, manifest, base, adapter, tokenizer)


def merged_weights(run: OpenRun, merge_base: MergeBase) -> LazyWeights:
    """Float32 weights by Hugging Face name of the ordinary model that the run amounts to.

    The vocabulary has three more rows than the base's. Tied models have no ``lm_head.weight``: the
    temperature is then in the embedding rows of the verdicts too (see ``calibrated_rows``).
    """
    base, adapter = base_weights(run, merge_base), run.adapter
    rotations: dict[str, Tensor] = {}
    if adapter.gates is not None:
        composed = composed_rotations(adapter.gates.safe, adapter.gates.command)
        rotations = dict(zip(run.gated_modules, composed, strict=True))
    added = _added_rows(run)
    shapes = {
        name: (rows + len(added[name]), *rest) if name in added else (rows, *rest)
        for name, (rows, *rest) in base.shapes.items()
    }

    def read(name: str, start: int, stop: int) -> Tensor:
        if name in added:
            last = base.shapes[name][0]
            own = base.rows(name, min(start, last), min(stop, last))
            return torch.cat([own, added[name][max(start - last, 0) : max(stop - last, 0)]])
        module, _, kind = name.rpartition(".")
        lora = adapter.lora.get(module) if kind == "weight" else None
        rows = base.rows(name, start, stop)
        if lora is None and module not in rotations:
            return rows
        return folded_rows(rows, start, lora, adapter.scale, rotations.get(module)).float()

    return LazyWeights(shapes, read)


def base_weights(run: OpenRun, merge_base: MergeBase) -> LazyWeights:
    """The weights an adapter is merged into: the float ones, or the 8- or 4-bit ones of training."""
    weights = run.base.weights
    if merge_base == "original":
        return weights
    held = {f"{module}.weight" for module in linear_names(run.base)}
    four_bit = _Dequant4(weights, run.manifest.config.four_bit or FourBit())

    def read(name: str, start: int, stop: int) -> Tensor:
        if name not in held:
            return weights.rows(name, start, stop)
        if merge_base == "dequant4":
            return four_bit.rows(name, start, stop)
        return dequant8(weights.rows(name, start, stop))

    return LazyWeights(weights.shapes, read)


class _Dequant4:
    """Rows of 4-bit weights. They depend on the whole weight, so the last one is kept."""

    def __init__(self, weights: LazyWeights, four_bit: FourBit) -> None:
        self._weights, self._four_bit = weights, four_bit
        self._name, self._weight = "", torch.empty(0)

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Rows ``start`` to ``stop``, float32; the caller may write into them."""
        if name != self._name:
            self._weight = dequant4(self._weights[name], self._four_bit)
            self._name = name
        return self._weight[start:stop].clone()


def gated_modules(base: BaseWeights) -> list[str]:
    """Attention output projections of every decoder layer, in layer order."""
    found: dict[int, str] = {}
    for module in linear_names(base):
        match = _GATED.fullmatch(module)
        if match is not None:
            found[int(match[1])] = module
    return [found[layer] for layer in sorted(found)]


def _added_rows(run: OpenRun) -> dict[str, Tensor]:
    output = calibrated_rows(run.adapter.verdict_rows, run.manifest.temperature).float()
    if run.base.tied:
        return {EMBEDDING: output}
    inputs = run.adapter.verdict_input_rows
    return {EMBEDDING: output if inputs is None else inputs.float(), OUTPUT: output}


def _read_adapter(directory: Path) -> Adapter:
    factors: dict[str, dict[str, Tensor]] = {}
    for key, tensor in read_tensors(directory / ADAPTER_TENSORS).items():
        match = _LORA_KEY.fullmatch(key)
        if match is None:
            raise ExportError(f"{directory / ADAPTER_TENSORS}: expected LoRA tensors, found {key}")
        factors.setdefault(match[1], {})[match[2]] = tensor
    for module, pair in factors.items():
        if set(pair) != {"A", "B"}:
            raise ExportError(
                f"{directory / ADAPTER_TENSORS}: {module}: expected lora_A and lora_B, found only "
                f"lora_{next(iter(pair))}"
            )
    safety = read_tensors(directory / SAFETY_TENSORS)
    gates = (
        GateTensors(safety["safe_generators"], safety["command_generators"])
        if "safe_generators" in safety
        else None
    )
    return Adapter(
        lora={module: LoraPair(pair["A"], pair["B"]) for module, pair in factors.items()},
        scale=_lora_scale(directory / ADAPTER_CONFIG),
        gates=gates,
        verdict_rows=safety["verdict_rows"],
        verdict_input_rows=safety.get("verdict_input_rows"),
    )


def _lora_scale(path: Path) -> float:
    """alpha / r, or alpha / √r for rank-stabilized LoRA (Kalajdzievski, arXiv:2312.03732)."""
    config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    used = [key for key in _UNSUPPORTED if config.get(key)]
    if used:
        raise ExportError(f"{path}: {', '.join(used)} cannot be merged; train with plain LoRA")
    rank = float(config["r"])
    return float(config["lora_alpha"]) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _check_temperature(directory: Path, base: BaseWeights, temperature: float) -> None:
    """A temperature divides logits; rows of a softcapped model can only divide what is capped."""
    family = FAMILIES.get(base.architecture)
    if family is not None and family.softcapped and temperature != 1.0:
        raise ExportError(
            f"{directory / MANIFEST}: expected temperature 1 for {base.architecture}, whose final "
            f"logits are softcapped, found {temperature:.3f}: it was fitted to capped logits and "
            'cannot be folded into rows whose logits are capped afterwards; set "temperature" to '
            "1.0 there: verdicts stay, probabilities are then not calibrated"
        )


def _check_fit(directory: Path, base: BaseWeights, adapter: Adapter) -> None:
    for module, pair in adapter.lora.items():
        own = base.weights.shapes.get(f"{module}.weight")
        shape = (pair.b.shape[0], pair.a.shape[1])
        if own != shape:
            found = "no such weight" if own is None else f"{own}"
            raise ExportError(
                f"{directory / ADAPTER_TENSORS}: {module}: expected a base weight of shape "
                f"{shape}, found {found}"
            )
    if (adapter.verdict_input_rows is None) != base.tied:
        raise ExportError(
            f"{directory / SAFETY_TENSORS}: verdict_input_rows belong to untied embeddings only, "
            f"and the base's are {'tied' if base.tied else 'untied'}"
        )
    if adapter.gates is not None and len(gated_modules(base)) != len(adapter.gates.safe):
        raise ExportError(
            f"{directory / SAFETY_TENSORS}: expected gates for {len(gated_modules(base))} layers, "
            f"found {len(adapter.gates.safe)}"
        )

"""The training configuration: one documented field per YAML key, unknown keys are errors."""

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from so8t_eval.cases import describe
from so8t_eval.errors import ConfigError

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
MAX_SEED = 2**32 - 1
SHIPPED_CORPUS = Path("shipped")
"""In ``replay_file``: the training file that comes with the package."""
MergeBase: TypeAlias = Literal["original", "dequant8", "dequant4"]
"""Base weights that an adapter is merged into: the float ones, or those that 8 or 4 bits leave."""


class FourBit(NamedTuple):
    """How 4-bit weights are made: the code, and whether the blocks' scales are quantized too."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True


class FitConfig(BaseModel):
    """Everything ``so8t-train fit`` needs. Key names follow PEFT and axolotl."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    """Version of this file format."""

    # -- what is trained, on what ------------------------------------------------------------
    base_model: str
    """``embedded:smollm2-135m-instruct``, a GGUF file or Hugging Face directory (relative to this
    file, or to the working directory), or a hub id."""
    train_file: tuple[Path, ...]
    """JSONL case files to train on; relative to this configuration file."""
    dev_file: tuple[Path, ...] = ()
    """JSONL case files for the dev split: progress, calibration and temperature, never training."""
    replay_file: tuple[Path, ...] = ()
    """JSONL case files of an earlier training to draw from and learn beside ``train_file``, relative
    to this file; ``shipped`` is the reference model's corpus."""
    replay_cases: Annotated[int, Field(ge=1)] | None = None
    """Cases drawn from ``replay_file``, by verdict as there; default: as many as ``train_file`` has."""
    init_from: Path | None = None
    """Run directory to continue from, relative to this file; ``reference`` is the shipped one."""
    output_dir: Path
    """Run directory to create; relative to the working directory."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Off unless you have read that code."""

    # -- base model --------------------------------------------------------------------------
    load_in_8bit: bool = True
    """Hold the frozen base in 8-bit (bitsandbytes LLM.int8)."""
    load_in_4bit: bool = False
    """Hold the frozen base in 4-bit (QLoRA); needs ``load_in_8bit: false`` beside it."""
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = "nf4"
    """Code of the 4-bit weights."""
    bnb_4bit_use_double_quant: bool = True
    """Quantize the 4-bit blocks' scales too: 0.4 bit less per weight."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Activations' dtype. auto: bfloat16 where the processor has it, else float32. float16 is
    refused: its gradients underflow without loss scaling."""
    device_map: Literal["auto", "cpu", "cuda"] = "auto"
    """Where layers go; auto fills the accelerator first, then the CPU."""
    offload_folder: Path | None = None
    """Directory for layers that fit neither accelerator nor RAM."""

    # -- adapter -----------------------------------------------------------------------------
    lora_r: Annotated[int, Field(ge=1, le=1024)] = 16
    """Rank of the LoRA update."""
    lora_alpha: Positive = 32.0
    """LoRA scale; the update is multiplied by lora_alpha / lora_r."""
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the LoRA input."""
    lora_target_modules: Literal["all-linear"] | tuple[str, ...] = "all-linear"
    """Module names that get LoRA; all-linear is every linear layer but the output matrix."""
    rotation_gates: bool = True
    """Put SO(8) rotation gates after every attention output projection."""
    rotation_init_std: NonNegative = 0.0
    """Standard deviation of the initial generators; 0 starts every rotation at the identity."""
    freeze: Literal["none", "safe"] = "none"
    """safe: keep R_safe and the verdict rows bit-identical."""

    # -- losses ------------------------------------------------------------------------------
    safety_loss_weight: NonNegative = 1.0
    """Weight of the verdict cross-entropy."""
    category_loss_weight: NonNegative = 0.0
    """Weight, within the verdict loss, of the cross-entropy over the cases' categories at the same
    position, by a head that is dropped after training; 0 turns it off."""
    task_loss_weight: NonNegative = 0.3
    """Weight of the reply cross-entropy; 0 skips the reply pass."""
    task_loss_share: Share = 1.0
    """Share of the replies learned per epoch, drawn anew each time; fewer is faster."""
    class_weights: Literal["balanced", "none"] | tuple[Positive, Positive, Positive] = "balanced"
    """Weights of allow, escalate and refuse in the verdict loss; balanced: inverse frequency."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of the verdict target spread over the three verdicts."""
    pet_weight: NonNegative = 0.01
    """Global weight (λ) of the PET temporal term; 0 turns it off."""
    pet_phase_weights: tuple[NonNegative, NonNegative, NonNegative] = (0.05, 0.2, 0.5)
    """Temporal weight in the early, middle and late phase of training."""
    pet_phase_starts: tuple[Share, Share] = (0.3, 0.7)
    """Share of training at which the middle and the late phase begin."""
    pet_inertia_weight: NonNegative = 0.001
    """Weight of the squared geodesic distance to the last checkpoint's rotations; 0: off."""

    # -- optimization ------------------------------------------------------------------------
    micro_batch_size: Annotated[int, Field(ge=1)] = 1
    """Cases per forward pass, packed without padding; short micro-batches are computed together."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1)] = 8
    """Micro-batches per optimizer step."""
    learning_rate: Positive = 2e-4
    """Peak learning rate of LoRA and R_cmd."""
    safety_learning_rate: Positive = 1e-4
    """Peak learning rate of R_safe and the verdict rows."""
    weight_decay: NonNegative = 0.0
    """AdamW weight decay."""
    max_grad_norm: Positive = 1.0
    """Gradient norm at which the step is scaled down."""
    max_loss_ratio: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 5.0
    """Stop, exploded, when a step's loss is this many times the first step's (or ln V, if more)."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.05
    """Share of steps with linearly rising learning rate; cosine decay to zero follows."""
    num_epochs: Positive = 2.0
    """Passes over the training cases."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after this many optimizer steps, if set."""
    gradient_checkpointing: bool = True
    """Recompute activations in the backward pass: less memory, about a third more time."""
    max_length: Annotated[int, Field(ge=64)] = 1024
    """Longest training sequence in tokens; longer cases are left out and counted."""
    seed: Annotated[int, Field(ge=0, le=MAX_SEED)] = 0
    """Seed of weights, order and dropout."""
    threads: Annotated[int, Field(ge=1)] | None = None
    """CPU threads; default: what torch chooses."""

    # -- saving ------------------------------------------------------------------------------
    adapter_dtype: Literal["float32", "float16"] = "float16"
    """Dtype of the saved LoRA weights. Checkpoints are always float32."""
    save_every_steps: Annotated[int, Field(ge=1)] = 100
    """Optimizer steps between checkpoints."""
    save_total_limit: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints kept; at 1 there is none to fall back to when the last is damaged."""
    eval_every_steps: Annotated[int, Field(ge=1)] = 50
    """Optimizer steps between dev evaluations."""
    eval_max_cases: Annotated[int, Field(ge=1)] = 120
    """Dev cases per evaluation during training (the last one uses all)."""
    merge_base: Literal["original", "dequant8", "dequant4"] = "original"
    """Weights the export merges into: the original float ones, or the dequantized 8-bit or 4-bit
    ones of training."""

    @field_validator("train_file", "dev_file", "replay_file", mode="before")
    @classmethod
    def _one_or_many(cls, value: object) -> object:
        return (value,) if isinstance(value, str | Path) else value

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        takes_bool = cls.model_fields[str(info.field_name)].annotation is bool
        if isinstance(value, bool) and not takes_bool:
            raise ValueError(f"expected no true or false here; found {str(value).lower()}")
        return value

    @model_validator(mode="after")
    def _phases_rise_and_files_given(self) -> "FitConfig":
        middle, late = self.pet_phase_starts
        if not 0 < middle < late:
            raise ValueError(
                "pet_phase_starts: expected 0 < middle phase < late phase, found "
                f"[{middle}, {late}]; for fewer phases give them equal pet_phase_weights"
            )
        if not self.train_file:
            raise ValueError("train_file: expected at least one file")
        if self.replay_cases and not self.replay_file:
            raise ValueError(
                "replay_cases: expected a replay_file to draw from, found none; add "
                "replay_file: shipped"
            )
        return self

    @model_validator(mode="after")
    def _one_precision(self) -> "FitConfig":
        if self.load_in_4bit and self.load_in_8bit:
            raise ValueError(
                "load_in_4bit: expected load_in_8bit: false beside it, found true (its default); "
                "the base is held in one precision: add load_in_8bit: false"
            )
        if problem := merge_base_problem(self, self.merge_base):
            raise ValueError(f"merge_base: {problem}")
        return self

    @property
    def four_bit(self) -> FourBit | None:
        """How the base's 4-bit weights are made; None for another base."""
        if not self.load_in_4bit:
            return None
        return FourBit(self.bnb_4bit_quant_type, self.bnb_4bit_use_double_quant)

    @property
    def quantizes_base(self) -> bool:
        """Whether the base's linear layers are held in 8-bit or 4-bit."""
        return self.load_in_8bit or self.load_in_4bit

    @property
    def precision(self) -> str:
        """What the base's linear layers are held in, for people."""
        if self.load_in_4bit:
            return "4-bit"
        return "8-bit" if self.load_in_8bit else "float"

    @property
    def trained_base(self) -> MergeBase:
        """The merge base whose weights are those of training."""
        if self.load_in_4bit:
            return "dequant4"
        return "dequant8" if self.load_in_8bit else "original"

    @property
    def cases_per_step(self) -> int:
        """Effective batch size: cases per optimizer step."""
        return self.micro_batch_size * self.gradient_accumulation_steps


def merge_base_problem(config: FitConfig, merge_base: MergeBase) -> str | None:
    """Why a run of ``config`` cannot be merged into this base; None if it can.

    8-bit weights may serve a float run too, for which they cost little; those of another quantized
    training may not: they are neither what the adapter learned on nor what the base is.
    """
    possible: tuple[MergeBase, ...] = ("original", "dequant8")
    if config.quantizes_base:
        possible = ("original", config.trained_base)
    if merge_base in possible:
        return None
    return (
        f"expected {' or '.join(possible)} for a run whose base is {config.precision}, found "
        f"{merge_base}; choose one of them"
    )


def load_config(path: Path | str) -> FitConfig:
    """Read a YAML configuration; paths but ``output_dir`` become absolute (relative to the file).

    Raises:
        ConfigError: missing file, broken YAML, unknown key, wrong type or range.
    """
    source = Path(path)
    try:
        raw = yaml.load(source.read_text(encoding="utf-8"), _UniqueKeyLoader)  # noqa: S506 - a SafeLoader
    except FileNotFoundError as error:
        raise ConfigError(
            f"{source}: no such file; give the path of a YAML configuration"
        ) from error
    except IsADirectoryError as error:
        raise ConfigError(
            f"{source}: expected a YAML configuration, found a directory; give the path of the file"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{source}: cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{source}: not valid YAML: {error}") from error
    if not isinstance(raw, dict):
        found = "none" if raw is None else type(raw).__name__
        raise ConfigError(f"{source}: expected 'key: value' lines, found {found}")
    config = parse_config(raw, str(source))
    root = source.resolve().parent
    return config.model_copy(
        update={
            "base_model": _base(config.base_model, root),
            "train_file": tuple(root / file for file in config.train_file),
            "dev_file": tuple(root / file for file in config.dev_file),
            "replay_file": tuple(
                file if file == SHIPPED_CORPUS else root / file for file in config.replay_file
            ),
            "init_from": _origin(config.init_from, root),
        }
    )


def _base(name: str, root: Path) -> str:
    """A local base model's path: relative to the file, or as it is where nothing is there."""
    return str(root / name) if (root / name).exists() else name


def _origin(init_from: Path | None, root: Path) -> Path | None:
    return init_from if init_from in {None, Path("reference")} else root / str(init_from)


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader to which a key given twice is an error, not a silent override."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key_node, _ in node.value:
            key = str(key_node.value)
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is given twice; keep one", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


def parse_config(raw: dict[str, object], where: str) -> FitConfig:
    """Validate decoded configuration values; ``where`` names their origin in errors."""
    try:
        return FitConfig.model_validate(raw)
    except ValidationError as error:
        lines = []
        for item in error.errors():
            key = ".".join(str(part) for part in item["loc"])
            problem = describe(item["type"], item["msg"], item["input"])
            if item["type"] == "extra_forbidden":
                problem = f"unknown key; {_suggestion(key)}"
            lines.append(f"{where}: {key + ': ' if key else ''}{problem}")
        raise ConfigError("\n".join(lines)) from error


def _suggestion(key: str) -> str:
    close = difflib.get_close_matches(key, FitConfig.model_fields, n=1)
    return (
        f"did you mean {close[0]!r}?" if close else "remove it or see docs/config.md for the keys"
    )

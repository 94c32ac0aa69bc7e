"""Predicted memory of a fit, part by part and phase by phase, from sizes alone.

Bytes follow what the training code keeps: a formula here names the module whose tensors it counts.
Nothing is measured but the share of interpreter and imports, which is given.
"""

import math
from collections.abc import Sequence
from typing import Final, Literal, NamedTuple

from so8t_train.config import FitConfig
from so8t_train.heap import MAPPED_FROM
from so8t_train.model_shape import ModelShape
from so8t_train.pass_sizes import PassSize
from so8t_train.so8_rotation import BLOCK_SIZE, GENERATOR_SIZE

Device = Literal["cpu", "cuda"]
PhaseName = Literal["load", "hold", "train", "save"]
_FLOAT: Final = 4
_ONEDNN_KEPT: Final = 1024
"""Compiled matrix products that oneDNN keeps (its default ONEDNN_PRIMITIVE_CACHE_CAPACITY)."""
_ONEDNN_BYTES: Final = 0.55 * (1 << 20)
"""Of one of them: 1024 held 0.56 GiB in a reference fit (mallinfo2, torch 2.13, AVX-512)."""
_HOLES: Final = {2: ((4, 0.55), (700, 1.75)), _FLOAT: ((4, 0.55), (700, 1.0))}
"""Holes in the heap per byte of a forward pass's activations, kept or not, by the bytes of a number
and the number of different pass lengths. Measured with glibc 2.36. bfloat16, the reference model:
0.82 GiB beside 1.48 GiB after the forward pass over its largest step; 2.6 GiB after all 904 steps,
whose passes have about 700 lengths. float32: fits of 50 steps, 81 to 117 lengths, and of two. A
freed aligned block serves no block of its own size, and blocks of ever new sizes leave remainders.
"""
_PEFT_STEPS: Final = 2.0
"""Times the holes where PEFT computes layers in float32, output by output: one observation."""
_INT_BYTES: Final = 8 + 32
"""Of a token id in a Python tuple: the pointer and the int object."""


class Part(NamedTuple):
    """One consumer of memory."""

    name: str
    n_bytes: int


class Phase(NamedTuple):
    """The parts that live at the same time when a phase needs most."""

    name: PhaseName
    parts: tuple[Part, ...]

    @property
    def total(self) -> int:
        """Bytes."""
        return sum(part.n_bytes for part in self.parts)


class MemoryPlan(NamedTuple):
    """Predicted memory of a fit; bytes. On CUDA of the device, else of the process."""

    phases: tuple[Phase, ...]
    imports: int
    """Of interpreter and libraries, measured; part of every phase on a CPU."""
    largest: PassSize
    """The pass that needs most."""

    @property
    def peak(self) -> int:
        """Bytes of the phase that needs most."""
        return max(phase.total for phase in self.phases)


class Setting(NamedTuple):
    """What is trained, how, and where: all that memory follows from."""

    shape: ModelShape
    config: FitConfig
    device: Device
    item_bytes: int
    """Of an activation: 2 for bfloat16, 4 for float32."""
    holds_weights: bool
    """Dequantized weights are kept (``fuse_cpu_lora``)."""

    @property
    def fused(self) -> bool:
        """Adapted layers are computed by ``cpu_lora``, not by PEFT."""
        plain = self.config.quantizes_base and not self.config.lora_dropout
        return plain and self.device == "cpu"


def lora_parameters(shape: ModelShape, config: FitConfig) -> int:
    """Numbers in A and B of every adapted layer."""
    targets = config.lora_target_modules
    adapted = [x for x in shape.linears if targets == "all-linear" or x.name in targets]
    return config.lora_r * sum(linear.n_in + linear.n_out for linear in adapted)


def trained_parameters(shape: ModelShape, config: FitConfig) -> int:
    """Numbers that learn: LoRA, generators of both rotations, verdict rows; float32 all."""
    learning_rotations = 1 if config.freeze == "safe" else 2
    generators = shape.layers * shape.hidden // BLOCK_SIZE * GENERATOR_SIZE
    rows = 0 if config.freeze == "safe" else 3 * shape.hidden
    gates = generators * learning_rotations if config.rotation_gates else 0
    return lora_parameters(shape, config) + gates + rows


def base_bytes(setting: Setting) -> int:
    """The frozen base: codes and scales of linear layers, all else as activations.

    LLM.int8: a byte for each weight and a float32 for each row. 4-bit: see ``four_bit_bytes``.
    """
    shape, item = setting.shape, setting.item_bytes
    rest = shape.embedding_parameters * item
    four_bit = setting.config.four_bit
    if four_bit is not None:
        return rest + sum(
            four_bit_bytes(x.parameters, double_quant=four_bit.double_quant) for x in shape.linears
        )
    if not setting.config.load_in_8bit:
        return rest + shape.linear_parameters * item
    rows = sum(linear.n_out for linear in shape.linears)
    scales = 2 if setting.fused else 1  # bitsandbytes' and the fused layer's
    return rest + shape.linear_parameters + rows * _FLOAT * scales


def four_bit_bytes(weights: int, *, double_quant: bool) -> int:
    """A 4-bit weight matrix: two codes to a byte, and a scale for each block of 64.

    A scale is a float32, or with double quantization a byte and a float32 for each 256 of them;
    then there is their mean, and the table of 256 values that the bytes stand for.
    """
    blocks = -(-weights // 64)
    codes = -(-weights // 2) + 16 * _FLOAT
    if not double_quant:
        return codes + blocks * _FLOAT
    return codes + blocks + (-(-blocks // 256) + 1 + 256) * _FLOAT


def held_bytes(setting: Setting) -> int:
    """Dequantized weights: all of them, or the largest where they are made in every pass."""
    shape = setting.shape
    if not setting.config.quantizes_base or setting.device != "cpu":
        return 0
    kept = setting.fused and setting.holds_weights
    numbers = shape.linear_parameters if kept else max(x.parameters for x in shape.linears)
    return numbers * setting.item_bytes


def layer_bytes_per_token(setting: Setting, *, temporal: bool) -> int:
    """What autograd keeps of a token in one decoder layer.

    transformers' norms and the rotation gate (``rotate_blocks``) keep their float32 input, packed
    attention float32 query, key and value (``span_attention``), the MLP four tensors of its width,
    PET (``temporal`` term) the second difference of the gated output.
    """
    shape, item, config = setting.shape, setting.item_bytes, setting.config
    hidden, query, key, wide = shape.hidden, shape.query_width, shape.key_width, shape.intermediate
    in_float = shape.norms_per_layer * hidden + query + 2 * key
    if config.rotation_gates:
        in_float += hidden * (2 if temporal else 1)
    if shape.head_norms:
        in_float += query + key
    inputs = _linear_inputs(setting)
    return int(_FLOAT * in_float + item * 3 * wide + inputs)


def _linear_inputs(setting: Setting) -> float:
    """Bytes per token of the inputs and inner products that a layer's linear modules keep.

    A fused layer keeps both in the activations' dtype, and layers with one input share it. PEFT
    keeps a float32 copy for every adapted layer; with dropout its mask too, which on a CPU is as
    wide as the copy.
    """
    shape, item, rank = setting.shape, setting.item_bytes, setting.config.lora_r
    inner = rank * len(shape.linears) / shape.layers
    each = sum(linear.n_in for linear in shape.linears) / shape.layers
    shared = 2 * shape.hidden + shape.query_width + shape.intermediate
    if setting.config.lora_dropout:
        mask = _FLOAT if setting.device == "cpu" else 1
        return _FLOAT * (each + inner) + mask * each
    if setting.fused or item == _FLOAT:
        return item * (shared + inner)
    return _FLOAT * (each + inner)


class PassMemory(NamedTuple):
    """What one pass adds at its peak, bytes."""

    activations: int
    """Kept by autograd for the backward pass."""
    working: int
    """Of the layer that is computed backward."""
    logits: int
    freed: int = 0
    """What checkpointing does not keep of the forward pass."""

    @property
    def total(self) -> int:
        """The logits are gone when the first layer's backward begins: the larger of both counts."""
        return self.activations + max(self.working, self.logits)


def pass_memory(setting: Setting, size: PassSize) -> PassMemory:
    """Memory of one pass.

    Logits are computed at supervised positions only (``losses``), three float32 copies at most: log
    probabilities, their gradient and the logits' gradient.
    """
    shape, item, config = setting.shape, setting.item_bytes, setting.config
    temporal = size.kind == "verdict" and bool(config.pet_weight and config.rotation_gates)
    one_layer = layer_bytes_per_token(setting, temporal=temporal)
    # MLP backward: gradients of the product, of both factors, and of the gated input.
    work = 4 * item * shape.intermediate + _FLOAT * shape.hidden
    kept = full = one_layer * shape.layers
    if config.gradient_checkpointing:
        # A layer's input each, and PET's term, which lies outside of what is recomputed.
        kept = shape.layers * shape.hidden * (item + (_FLOAT if temporal else 0))
        work += one_layer
    logits = 3 * _FLOAT * size.supervised * (shape.vocabulary + 3)
    return PassMemory(size.tokens * kept, size.tokens * work, logits, size.tokens * (full - kept))


def plan_memory(
    setting: Setting, passes: Sequence[PassSize], *, imports: int, token_ids: int
) -> MemoryPlan:
    """Memory of every phase; ``passes`` are those of the whole fit, ``token_ids`` its tokens."""
    shape, config = setting.shape, setting.config
    on_cpu = setting.device == "cpu"
    trained = trained_parameters(shape, config) * _FLOAT
    process = (Part("interpreter and imports", imports),) if on_cpu else ()
    base = Part("base weights", base_bytes(setting))
    adapters = Part("adapters", trained)
    held = Part("dequantized weights", held_bytes(setting))
    data = Part("token ids", token_ids * _INT_BYTES if on_cpu else 0)
    largest = max(passes, key=lambda size: pass_memory(setting, size).total)
    mapped = Part("mapped file", _still_mapped(setting))
    still = (*process, base, adapters, data, held, mapped)
    learning = (
        Part("gradients", trained),
        Part("optimizer state", 2 * trained),
        Part("rotations of the step", _rotation_bytes(setting)),
        Part("compiled matrix products", _compiled_bytes(setting, passes)),
    )
    working = _at_work(setting, passes, largest)
    copies = Part("checkpoint copies", 2 * trained)
    phases = (
        Phase("load", (*process, *_loading(setting))),
        Phase("hold", still),
        Phase("train", (*still, *learning, *working)),
        # The heap stays as large as training made it; only what was mapped is given back.
        Phase("save", (*still, *learning[1:], *working[:2], copies)),
    )
    return MemoryPlan(phases, imports, largest)


def _at_work(
    setting: Setting, passes: Sequence[PassSize], largest: PassSize
) -> tuple[Part, Part, Part]:
    """What the passes need: activations, holes between them, logits.

    On a CPU the heap of the largest pass is still there when another pass maps its logits.
    """
    if setting.device != "cpu":
        needs = pass_memory(setting, largest)
        return (
            Part("activations", needs.activations),
            Part("holes in the heap", 0),
            Part("logits", needs.total - needs.activations),
        )
    needed = [pass_memory(setting, size) for size in passes]
    mapped = [n.logits if n.logits > 3 * MAPPED_FROM else 0 for n in needed]
    heap, freed = max(
        (n.activations + max(n.working, 0 if m else n.logits), n.freed)
        for n, m in zip(needed, mapped, strict=True)
    )
    share = _hole_share(setting, len({size.tokens for size in passes}))
    holes = int((heap + freed) * share)
    return (
        Part("activations", heap),
        Part("holes in the heap", holes),
        Part("logits", max(mapped)),
    )


def _hole_share(setting: Setting, lengths: int) -> float:
    """Bytes of holes per byte of activations: linear in the logarithm between the measurements."""
    (few, low), (many, high) = _HOLES[setting.item_bytes]
    at = math.log(max(lengths, few) / few) / math.log(many / few)
    by_steps = not setting.fused and setting.item_bytes == _FLOAT
    return (low + min(1.0, at) * (high - low)) * (_PEFT_STEPS if by_steps else 1.0)


def _still_mapped(setting: Setting) -> int:
    """Weights that were read to be quantized, in safetensors that embeddings are still used from.

    They are: nothing copies what has the activations' dtype already. These pages are the system's
    to take back; until then they count as resident.
    """
    shape, item = setting.shape, setting.item_bytes
    same_dtype = round(shape.file_bytes / shape.parameters) == item
    if setting.device != "cpu" or shape.is_gguf or not same_dtype:
        return 0
    return shape.linear_parameters * item if setting.config.quantizes_base else 0


def _loading(setting: Setting) -> tuple[Part, ...]:
    """transformers dequantizes a whole GGUF to float32; safetensors are mapped and cast."""
    shape = setting.shape
    if shape.is_gguf:
        return (
            Part("mapped file", shape.file_bytes),
            Part("float32 weights", shape.parameters * _FLOAT),
        )
    return (
        Part("mapped file", shape.file_bytes),
        Part("base weights", base_bytes(setting)),
    )


def _rotation_bytes(setting: Setting) -> int:
    """float64 exponentials of both rotations with their graph (``RotationGateBank``)."""
    if not setting.config.rotation_gates:
        return 0
    blocks = setting.shape.layers * setting.shape.hidden // BLOCK_SIZE
    return blocks * BLOCK_SIZE**2 * 8 * 2 * 6


def _compiled_bytes(setting: Setting, passes: Sequence[PassSize]) -> int:
    """oneDNN compiles a bfloat16 product anew for every number of tokens, and keeps 1024."""
    if setting.device != "cpu" or setting.item_bytes == _FLOAT:
        return 0
    shapes = {(x.n_in, x.n_out) for x in setting.shape.linears}
    ins, outs = {i for i, _ in shapes}, {o for _, o in shapes}
    # Forward and backward of W, of A and of B, and both of the output matrix.
    per_pass = 2 * len(shapes) + 3 * len(ins) + 3 * len(outs) + 2
    distinct = len({size.tokens for size in passes}) * per_pass
    return int(min(_ONEDNN_KEPT, distinct) * _ONEDNN_BYTES)

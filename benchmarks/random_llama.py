"""Llama-shaped bases with random weights: bfloat16, sharded, with a tokenizer made on the spot.

For memory and speed only: their verdicts mean nothing. The tokenizer has 448 tokens, whatever the
size of the embedding matrix, so texts are longer in tokens than with a real one.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

SHARD_PARAMETERS: Final = 500_000_000
WEIGHT_STD: Final = 0.02
_POOL: Final = 1 << 22


class LlamaShape(NamedTuple):
    """Sizes of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes (out, in) of a layer's matrices by module name."""
        h, wide = self.hidden, self.intermediate
        narrow = h // self.heads * self.key_value_heads
        return {
            "self_attn.q_proj": (h, h),
            "self_attn.k_proj": (narrow, h),
            "self_attn.v_proj": (narrow, h),
            "self_attn.o_proj": (h, h),
            "mlp.gate_proj": (wide, h),
            "mlp.up_proj": (wide, h),
            "mlp.down_proj": (h, wide),
        }

    @property
    def parameters(self) -> int:
        """Numbers in all matrices."""
        layer = sum(out * wide for out, wide in self.linears.values())
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.layers * layer


SHAPES: Final = {
    "tiny": LlamaShape(64, 160, 2, 4, 2, 448, tied=True),
    "1b": LlamaShape(2048, 8192, 16, 32, 8, 128_256, tied=True),  # as Llama 3.2 1B
    "7b": LlamaShape(4096, 11_008, 32, 32, 32, 32_000, tied=False),  # as Llama 2 7B
}


def write_base(directory: Path, shape: LlamaShape, seed: int) -> None:
    """Write config.json, shards with their index, tokenizer and chat template.

    The index goes last: a directory without one is not finished.
    """
    import transformers
    from safetensors.torch import save_file
    from support.tiny_hf import save_tiny_tokenizer

    directory.mkdir(parents=True, exist_ok=True)
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.key_value_heads,
        max_position_embeddings=4096,
        tie_word_embeddings=shape.tied,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    save_tiny_tokenizer(directory)
    places: dict[str, str] = {}
    for number, shard in enumerate(_shards(_tensors(shape, seed)), start=1):
        name = f"model-{number:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
    index = json.dumps({"metadata": {}, "weight_map": places})
    (directory / "model.safetensors.index.json").write_text(index, encoding="utf-8")


def is_finished(directory: Path) -> bool:
    """Whether ``write_base`` got to its end there."""
    return (directory / "model.safetensors.index.json").is_file()


def _shards(tensors: Iterator[tuple[str, Any]]) -> Iterator[dict[str, Any]]:
    shard: dict[str, Any] = {}
    size = 0
    for name, tensor in tensors:
        shard[name] = tensor
        size += tensor.numel()
        if size > SHARD_PARAMETERS:
            yield shard
            shard, size = {}, 0
    if shard:
        yield shard


def _tensors(shape: LlamaShape, seed: int) -> Iterator[tuple[str, Any]]:
    import torch

    # Drawn once and repeated: ten thousand million draws would take longer than the training.
    generator = torch.Generator().manual_seed(seed)
    pool = (WEIGHT_STD * torch.randn(_POOL, generator=generator)).bfloat16()

    def made(out: int, wide: int) -> Any:
        start = int(torch.randint(_POOL, (1,), generator=generator))
        repeated = pool.roll(start).repeat(-(-out * wide // _POOL))
        return repeated[: out * wide].reshape(out, wide).clone()

    def ones() -> Any:
        return torch.ones(shape.hidden, dtype=torch.bfloat16)

    yield "model.embed_tokens.weight", made(shape.vocabulary, shape.hidden)
    for i in range(shape.layers):
        for name, size in shape.linears.items():
            yield f"model.layers.{i}.{name}.weight", made(*size)
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{i}.{name}.weight", ones()
    yield "model.norm.weight", ones()
    if not shape.tied:
        yield "lm_head.weight", made(shape.vocabulary, shape.hidden)

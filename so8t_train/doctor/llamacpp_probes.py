"""Probes of llama.cpp: its build, and one token really decoded by a model written on the spot.

``llama_cpp`` and ``gguf`` are imported inside the probes, which run in a child process.
"""

import tempfile
from pathlib import Path
from typing import Final

from so8t_train.doctor.finding import Answer, Probe

_VOCABULARY, _WIDTH, _FEED_FORWARD, _HEADS = 64, 32, 64, 2


def _build() -> Answer:
    from so8t_eval.backends.llamacpp_context import runtime_version

    return Answer("ok", runtime_version().replace(" = 1", "").replace(" |", ""))


def _decode() -> Answer:
    import numpy as np

    from so8t_eval.backends.llamacpp_context import LlamaContext, LlamaModel

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as directory:
        model = LlamaModel(write_smallest_model(Path(directory) / "smallest.gguf"))
        context = LlamaContext(
            model,
            n_positions=32,
            batch_tokens=8,
            longest_batch=8,
            max_sequences=1,
            threads=1,
            flash_attention=True,
            float32_memory=False,
        )
        context.decode([1, 2, 3], range(3), [range(1)] * 3, [2])
        logits = context.logits(2).copy()
        context.close()
        model.close()
    if not (np.isfinite(logits).all() and np.ptp(logits) > 0):
        return Answer("failed", "a decoded token has no finite logits", _REBUILD)
    return Answer("ok", "a small random model decodes")


def write_smallest_model(path: Path) -> Path:
    """Write a one-layer random llama model without vocabulary, about 40 kB; returns ``path``."""
    import numpy as np
    from gguf import GGUFWriter

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(64)
    writer.add_embedding_length(_WIDTH)
    writer.add_block_count(1)
    writer.add_feed_forward_length(_FEED_FORWARD)
    writer.add_head_count(_HEADS)
    writer.add_head_count_kv(_HEADS)
    writer.add_rope_dimension_count(_WIDTH // _HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(_VOCABULARY)
    writer.add_tokenizer_model("no_vocab")
    rng = np.random.default_rng(0)
    square, wide = (_WIDTH, _WIDTH), (_FEED_FORWARD, _WIDTH)
    shapes: dict[str, tuple[int, ...]] = {
        "token_embd": (_VOCABULARY, _WIDTH),
        "output": (_VOCABULARY, _WIDTH),
        "output_norm": (_WIDTH,),
        "blk.0.attn_norm": (_WIDTH,),
        "blk.0.ffn_norm": (_WIDTH,),
        **{f"blk.0.attn_{name}": square for name in ("q", "k", "v", "output")},
        "blk.0.ffn_gate": wide,
        "blk.0.ffn_up": wide,
        "blk.0.ffn_down": wide[::-1],
    }
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


_REBUILD: Final = (
    "rebuild llama.cpp on this machine: pip install --force-reinstall --no-binary llama-cpp-python "
    "llama-cpp-python (needs a C++ compiler)"
)
PROBES: Final = (
    Probe("llama.cpp", _build, _REBUILD),
    Probe("llama.cpp decodes", _decode, _REBUILD),
)

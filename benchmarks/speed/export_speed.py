"""Time and peak memory of ``so8t-train export`` against merging with PEFT and converting.

Run: python benchmarks/speed/export_speed.py [--parameters 1e9] [--rounds 3] [--threads 2]

Both make a Q8_0 GGUF of the same random Llama-shaped base (bfloat16, sharded, tied embeddings) and
the same random adapter, each step in a process of its own whose peak resident set the system counts
(Linux and macOS) and whose imports are not timed:

* SO8T: ``export --certificate none``: LoRA merged, rotation gates folded, verdict rows added.
* The peer: PEFT's ``merge_and_unload``, transformers' ``save_pretrained``, a loop that gives every
  tensor to gguf's writer as float16, llama.cpp's quantizer at its defaults. It leaves gates and
  verdict rows out, so it has less to do. Its memory is that of its largest step.

Needs about 6 bytes of disk per parameter (``--directory DIR``: there). Prints medians as a Markdown
table; writes nothing that stays.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

ROOT: Final = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

RSS_UNIT: Final = 1 if sys.platform == "darwin" else 1024  # bytes of one unit of ru_maxrss
LAYERS: Final = 16
HEAD_SIZE: Final = 64
LORA_RANK: Final = 16
SHARD_PARAMETERS: Final = 250_000_000
MEMORY_BAR: Final = 0.35
TIME_BAR: Final = 1.0
FEED_FORWARD: Final = ("gate_proj", "up_proj", "down_proj")


class Shape(NamedTuple):
    """A Llama-shaped model: a quarter as many key-value heads, feed-forward of four widths."""

    hidden: int
    vocabulary: int

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """Shapes (out, in) of a layer's matrices by module name."""
        h = self.hidden
        narrow, wide = {"self_attn.k_proj", "self_attn.v_proj"}, 4 * h
        shapes = {f"self_attn.{x}_proj": (h, h) for x in "qkvo"}
        shapes |= dict.fromkeys(narrow, (h // 4, h))
        shapes |= {f"mlp.{name}": (wide, h) for name in FEED_FORWARD}
        return shapes | {"mlp.down_proj": (h, wide)}

    @property
    def parameters(self) -> int:
        """Numbers in all matrices."""
        layer = sum(out * wide for out, wide in self.linears.values())
        return self.hidden * self.vocabulary + LAYERS * layer


class Measured(NamedTuple):
    """One step: seconds, and resident sets in MiB after its imports and at its peak."""

    step: str
    seconds: float
    imported_mib: float
    peak_mib: float


def shape_for(parameters: float) -> Shape:
    """The smallest shape with so many parameters; heads of 64 and a quarter of them for keys."""
    vocabulary = 128_256 if parameters >= 9e8 else 32_768
    hidden = 4 * HEAD_SIZE
    while Shape(hidden, vocabulary).parameters < 0.97 * parameters:
        hidden += 4 * HEAD_SIZE
    return Shape(hidden, vocabulary)


def build(directory: Path, shape: Shape) -> None:
    """Write ``base`` and ``run``."""
    import torch

    pool = torch.randn(1 << 24, generator=torch.Generator().manual_seed(0)).mul_(0.02).bfloat16()

    def made(*size: int) -> Any:
        n = 1
        for extent in size:
            n *= extent
        return pool.repeat(-(-n // len(pool)))[:n].reshape(size).clone()

    _write_base(directory / "base", shape, made)
    _write_run(directory / "run", directory / "base", shape, made)


def _write_base(directory: Path, shape: Shape, made: Callable[..., Any]) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file
    from support.tiny_hf import save_tiny_tokenizer

    heads = shape.hidden // HEAD_SIZE
    config = transformers.LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=4 * shape.hidden,
        num_hidden_layers=LAYERS,
        num_attention_heads=heads,
        num_key_value_heads=heads // 4,
        tie_word_embeddings=True,
        dtype="bfloat16",
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(directory)
    save_tiny_tokenizer(directory)

    def tensors() -> Iterator[tuple[str, Any]]:
        yield "model.embed_tokens.weight", made(shape.vocabulary, shape.hidden)
        for i in range(LAYERS):
            for name, size in shape.linears.items():
                yield f"model.layers.{i}.{name}.weight", made(*size)
            for name in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{i}.{name}.weight", torch.ones(shape.hidden).bfloat16()
        yield "model.norm.weight", torch.ones(shape.hidden).bfloat16()

    places: dict[str, str] = {}
    shard: dict[str, Any] = {}
    size = 0

    def flush() -> None:
        name = f"model-{len(set(places.values())) + 1:05d}.safetensors"
        save_file(shard, directory / name, metadata={"format": "pt"})
        places.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in tensors():
        shard[name] = tensor
        size += tensor.numel()
        if size > SHARD_PARAMETERS:
            flush()
            size = 0
    flush()
    index = {"metadata": {}, "weight_map": places}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _write_run(directory: Path, base: Path, shape: Shape, made: Callable[..., Any]) -> None:
    import peft
    from safetensors.torch import save_file

    from so8t_eval.file_hash import file_sha256
    from so8t_train.base_model import load_tokenizer, resolve_base
    from so8t_train.config import FitConfig
    from so8t_train.run_dir import (
        ADAPTER_TENSORS,
        FORMAT_VERSION,
        MANIFEST,
        PARTS,
        SAFETY_TENSORS,
        RunManifest,
    )

    modules = [name.rpartition(".")[2] for name in shape.linears]
    lora = peft.LoraConfig(
        r=LORA_RANK, lora_alpha=2 * LORA_RANK, target_modules=modules, task_type="CAUSAL_LM"
    )
    lora.base_model_name_or_path = str(base)
    lora.save_pretrained(directory)
    factors = {}
    for i in range(LAYERS):
        for name, (out, wide) in shape.linears.items():
            stem = f"base_model.model.model.layers.{i}.{name}"
            factors[f"{stem}.lora_A.weight"] = made(LORA_RANK, wide)
            factors[f"{stem}.lora_B.weight"] = made(out, LORA_RANK)
    save_file(factors, directory / ADAPTER_TENSORS, metadata={"format": "pt"})
    safety = {
        f"{name}_generators": made(LAYERS, shape.hidden // 8, 28).float()
        for name in ("safe", "command")
    }
    save_file(safety | {"verdict_rows": made(3, shape.hidden).float()}, directory / SAFETY_TENSORS)
    source = resolve_base(str(base))
    manifest = RunManifest(
        format_version=FORMAT_VERSION,
        protocol_hash=load_tokenizer(source).protocol.hash,
        base_model=str(base),
        base_sha256=source.sha256,
        temperature=1.0,
        sha256={name: file_sha256(directory / name) for name in PARTS if name != MANIFEST},
        config=FitConfig.model_validate(
            {"base_model": str(base), "train_file": ("none.jsonl",), "output_dir": directory}
        ),
        versions={},
        platform="",
        training={},
    )
    (directory / MANIFEST).write_text(manifest.model_dump_json(), encoding="utf-8")


def export_with_so8t(directory: Path, threads: int) -> Callable[[], None]:
    """Import what the step needs and return the step."""
    import transformers

    from so8t_train.base_model import quiet_libraries
    from so8t_train.export import ExportOptions, export

    with quiet_libraries():  # imports parts of transformers
        _ = transformers.AutoConfig
    options = ExportOptions(quants="q8_0", certificate="none", threads=threads)
    return lambda: print(export(directory / "run", directory / "so8t", options).directory)


def merge_with_peft(directory: Path, threads: int) -> Callable[[], None]:
    """The peer's first step: a merged Hugging Face directory."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    def step() -> None:
        torch.set_num_threads(threads)
        model = AutoModelForCausalLM.from_pretrained(directory / "base", dtype=torch.bfloat16)
        merged = PeftModel.from_pretrained(model, directory / "run").merge_and_unload()
        merged.save_pretrained(directory / "merged")

    return step


def convert_plainly(directory: Path, _threads: int) -> Callable[[], None]:
    """The peer's second step: a float16 GGUF, tensor by tensor through gguf's writer."""
    import gguf
    import torch
    from safetensors import safe_open

    from so8t_train.gguf_layout import HeadCounts, gguf_name, to_gguf_layout

    def step() -> None:
        config = json.loads((directory / "merged" / "config.json").read_text(encoding="utf-8"))
        heads = HeadCounts(config["num_attention_heads"], config["num_key_value_heads"])
        writer = gguf.GGUFWriter(directory / "peer-F16.gguf", "llama")
        writer.add_context_length(config["max_position_embeddings"])
        writer.add_embedding_length(config["hidden_size"])
        writer.add_block_count(config["num_hidden_layers"])
        writer.add_feed_forward_length(config["intermediate_size"])
        writer.add_head_count(heads.query)
        writer.add_head_count_kv(heads.key_value)
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
        writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
        for shard in sorted((directory / "merged").glob("*.safetensors")):
            with safe_open(shard, framework="pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - it is no mapping
                    weight = tensors.get_tensor(name)
                    kind = torch.float16 if weight.dim() > 1 else torch.float32
                    own = to_gguf_layout(name, weight.to(kind), "llama", heads)
                    writer.add_tensor(gguf_name(name), own.contiguous().numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()

    return step


def quantize_plainly(directory: Path, threads: int) -> Callable[[], None]:
    """The peer's third step: llama.cpp's quantizer at its defaults."""
    import ctypes

    import llama_cpp.llama_cpp as c_api

    def step() -> None:
        parameters = c_api.llama_model_quantize_default_params()
        parameters.nthread, parameters.ftype = threads, 7
        files = [os.fsencode(directory / f"peer-{kind}.gguf") for kind in ("F16", "Q8_0")]
        if c_api.llama_model_quantize(*files, ctypes.byref(parameters)):
            raise SystemExit("llama.cpp could not quantize the peer's file")

    return step


STEPS: Final[dict[str, Callable[[Path, int], Callable[[], None]]]] = {
    "so8t": export_with_so8t,
    "merge": merge_with_peft,
    "convert": convert_plainly,
    "quantize": quantize_plainly,
}


def peak_mib() -> float:
    """Largest resident set of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT / 2**20


def run_child(name: str, directory: Path, options: argparse.Namespace) -> None:
    """In the child: build, or measure one step and leave the result in a file."""
    if name == "build":
        build(directory, shape_for(options.parameters))
        return
    step = STEPS[name](directory, options.threads)
    imported = peak_mib()
    started = time.perf_counter()
    step()
    found = Measured(name, time.perf_counter() - started, imported, peak_mib())
    (directory / f"{name}.json").write_text(json.dumps(found), encoding="utf-8")


def in_child(name: str, directory: Path, options: argparse.Namespace) -> None:
    """Run a step in a process of its own.

    Raises:
        SystemExit: it failed; with what it said.
    """
    command = [sys.executable, __file__, "--child", name, "--directory", str(directory)]
    command += ["--parameters", str(options.parameters), "--threads", str(options.threads)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name}: exit code {done.returncode}\n{done.stderr[-3000:]}")


def measure(directory: Path, options: argparse.Namespace) -> dict[str, list[Measured]]:
    """Build the model once; run every step in every round, and delete what a round has written.

    Ours comes first, so the peer finds its base in the cache.
    """
    in_child("build", directory, options)
    found: dict[str, list[Measured]] = {name: [] for name in STEPS}
    for _ in range(options.rounds):
        for name, results in found.items():
            in_child(name, directory, options)
            text = (directory / f"{name}.json").read_text(encoding="utf-8")
            results.append(Measured(*json.loads(text)))
        for output in ("so8t", "merged"):
            shutil.rmtree(directory / output)
        for kind in ("F16", "Q8_0"):
            (directory / f"peer-{kind}.gguf").unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parameters", type=float, default=1e9)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--directory", type=Path, help="where to make the temporary directory")
    parser.add_argument("--child", choices=["build", *STEPS], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_child(options.child, options.directory, options)
        return
    shape = shape_for(options.parameters)
    print(f"{shape.parameters / 1e9:.2f} billion parameters, {options.threads} threads\n")
    with tempfile.TemporaryDirectory(dir=options.directory) as scratch:
        found = measure(Path(scratch), options)
    print("| Step | Time | RSS after imports | Peak RSS | Above imports |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for name, results in found.items():
        seconds = statistics.median(row.seconds for row in results)
        imported = statistics.median(row.imported_mib for row in results)
        peak = statistics.median(row.peak_mib for row in results)
        print(
            f"| {name} | {seconds:.1f} s | {imported:.0f} MiB | {peak:.0f} MiB | "
            f"{peak - imported:.0f} MiB |"
        )
    rounds = list(zip(*found.values(), strict=True))
    memory = statistics.median(
        ours.peak_mib / max(row.peak_mib for row in peer) for ours, *peer in rounds
    )
    took = [ours.seconds / sum(row.seconds for row in peer) for ours, *peer in rounds]
    print(
        f"\nmemory: {memory:.2f} of the peer's (bar {MEMORY_BAR}); time: "
        f"{statistics.median(took):.2f} (bar {TIME_BAR}; rounds: "
        f"{', '.join(f'{ratio:.2f}' for ratio in took)})"
    )


if __name__ == "__main__":
    main()

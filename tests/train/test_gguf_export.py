"""The GGUF writer: the base's metadata and tensors, three rows more, numbers in their places."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st
from support.export_run import make_base, make_run
from support.tiny_hf import BOS, EOS, PAD, SPECIAL_TOKENS, VOCABULARY
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from so8t_eval.backends.gguf_header import read_gguf_metadata, so8t_keys
from so8t_eval.errors import DiskError, ExportError
from so8t_eval.labels import VERDICT_TOKENS
from so8t_train.base_model import EMBEDDED, load_base, resolve_base
from so8t_train.base_weights import BaseWeights, read_base_weights
from so8t_train.float_files import facts_of
from so8t_train.gguf_export import Float16RangeError, check_gguf_base, write_gguf
from so8t_train.gguf_layout import HeadCounts, gguf_name, hf_name, to_gguf_layout, to_hf_layout
from so8t_train.gguf_rope import rope_tensors
from so8t_train.gguf_settings import settings_of
from so8t_train.gguf_vocabulary import vocabulary_of
from so8t_train.merged_model import OpenRun, merged_weights, open_run

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

CONTROL, UNUSED, NORMAL = 3, 5, 1
Q_PROJ = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def qwen_run(tmp_path_factory: pytest.TempPathFactory) -> OpenRun:
    """Untied, with biases and spare embedding rows."""
    directory = tmp_path_factory.mktemp("gguf")
    base = make_base(directory / "base", "qwen2", tied=False, spare_rows=5)
    return open_run(make_run(directory / "run", base, load_in_8bit=False))


@pytest.fixture(scope="module")
def llama_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(tmp_path_factory.mktemp("gguf") / "llama", "llama")


def _edited(base: Path, target: Path, **changes: object) -> BaseWeights:
    """A copy of a base with other entries in its config.json."""
    target.mkdir()
    for file in base.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    config = json.loads((base / "config.json").read_text(encoding="utf-8")) | changes
    (target / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return read_base_weights(resolve_base(str(target)))


@given(heads=st.integers(1, 5), half=st.integers(1, 6), columns=st.integers(1, 3))
def test_the_two_layouts_are_inverse(heads: int, half: int, columns: int) -> None:
    weight = torch.arange(heads * 2 * half * columns).reshape(heads * 2 * half, columns)
    counts = HeadCounts(heads, heads)
    there = to_gguf_layout(Q_PROJ, weight, "llama", counts)
    assert torch.equal(to_hf_layout(Q_PROJ, there, "llama", counts), weight)
    assert torch.equal(to_gguf_layout(Q_PROJ, weight, "qwen2", counts), weight)


def test_llama_queries_are_interleaved_per_head() -> None:
    rows = torch.arange(8)[:, None]
    permuted = to_gguf_layout(Q_PROJ, rows, "llama", HeadCounts(2, 1))
    assert permuted[:, 0].tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    name = Q_PROJ.replace("q_proj", "k_proj")
    keys = to_gguf_layout(name, rows, "llama", HeadCounts(2, 1))
    assert keys[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]


@pytest.mark.parametrize(
    ("hf", "gguf"),
    [
        ("model.embed_tokens.weight", "token_embd.weight"),
        ("lm_head.weight", "output.weight"),
        ("model.norm.weight", "output_norm.weight"),
        ("model.layers.12.self_attn.o_proj.weight", "blk.12.attn_output.weight"),
        ("model.layers.0.self_attn.k_proj.bias", "blk.0.attn_k.bias"),
        ("model.layers.3.self_attn.q_norm.weight", "blk.3.attn_q_norm.weight"),
        ("model.layers.3.post_attention_layernorm.weight", "blk.3.ffn_norm.weight"),
    ],
)
def test_names_translate_both_ways(hf: str, gguf: str) -> None:
    assert gguf_name(hf) == gguf
    assert hf_name(gguf) == hf


def test_unknown_names_have_no_translation() -> None:
    assert hf_name("rope_freqs.weight") is None
    assert gguf_name("model.layers.0.mlp.experts.weight") is None


def test_a_gguf_base_reads_as_transformers_reads_it() -> None:
    source = resolve_base(EMBEDDED)
    base = read_base_weights(source)
    loaded = load_base(source, load_in_8bit=False, dtype=torch.float32).state_dict()
    assert base.tied
    assert set(base.weights) == set(loaded) - {"lm_head.weight"}
    assert all(torch.equal(base.weights[name], loaded[name]) for name in base.weights)


def test_metadata_and_vocabulary_of_a_hugging_face_base(qwen_run: OpenRun, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, qwen_run, merged_weights(qwen_run, "original"), "f16", facts_of(qwen_run))
    metadata = read_gguf_metadata(path)
    keys = so8t_keys(path, metadata)
    rows = VOCABULARY + 5
    assert keys.verdict_tokens == (rows, rows + 1, rows + 2)
    assert keys.protocol_hash == qwen_run.manifest.protocol_hash
    assert keys.temperature == pytest.approx(1.4)
    assert metadata["so8t.adapter_sha256"] == qwen_run.adapter_sha256
    assert metadata["general.architecture"] == "qwen2"
    assert metadata["general.file_type"] == 1
    assert metadata["qwen2.attention.head_count_kv"] == 2
    assert metadata["qwen2.vocab_size"] == rows + 3
    assert metadata["tokenizer.ggml.pre"] == "qwen2"
    assert metadata["tokenizer.ggml.bos_token_id"] == SPECIAL_TOKENS.index(BOS)
    assert metadata["tokenizer.ggml.eos_token_id"] == SPECIAL_TOKENS.index(EOS)
    assert metadata["tokenizer.ggml.padding_token_id"] == SPECIAL_TOKENS.index(PAD)
    reader = GGUFReader(path)
    tokens = reader.fields["tokenizer.ggml.tokens"].contents()
    types = reader.fields["tokenizer.ggml.token_type"].contents()
    assert tokens[-3:] == list(VERDICT_TOKENS)
    assert types[-3:] == [CONTROL] * 3
    assert tokens[VOCABULARY:rows] == [f"[PAD{i}]" for i in range(VOCABULARY, rows)]
    assert types[VOCABULARY:rows] == [UNUSED] * 5
    assert types[:4] == [CONTROL, CONTROL, CONTROL, NORMAL]
    merges = reader.fields["tokenizer.ggml.merges"].contents()
    assert len(merges) == VOCABULARY - 3 - 256


def test_tensors_are_the_merged_weights(qwen_run: OpenRun, tmp_path: Path) -> None:
    weights = merged_weights(qwen_run, "original")
    path = tmp_path / "model.gguf"
    write_gguf(path, qwen_run, weights, "f16", facts_of(qwen_run))
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    assert {hf_name(name) for name in tensors} == set(weights)
    for name, tensor in tensors.items():
        expected = weights[str(hf_name(name))]
        values = np.array(tensor.data).reshape(expected.shape)
        is_vector = expected.dim() == 1
        assert values.dtype == (np.float32 if is_vector else np.float16)
        np.testing.assert_array_equal(values, expected.numpy().astype(values.dtype))


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "granite"},
        {"hidden_act": "gelu"},
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}},
        {"use_sliding_window": True},
    ],
)
def test_an_unsupported_base_is_told_of(
    llama_base: Path, tmp_path: Path, changes: dict[str, object]
) -> None:
    base = _edited(llama_base, tmp_path / "base", **changes)
    tokenizer = open_tokenizer(base)
    with pytest.raises(ExportError, match="--format hf"):
        check_gguf_base(base, tokenizer)


def open_tokenizer(base: BaseWeights):  # type: ignore[no-untyped-def]
    from so8t_train.base_model import load_tokenizer

    return load_tokenizer(base.source)


def test_an_unknown_pre_tokenizer_is_told_of(llama_base: Path) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = open_tokenizer(read_base_weights(resolve_base(str(llama_base)))).tokenizer
    assert vocabulary_of(tokenizer, VOCABULARY, llama_base).pre == "smollm"
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    assert vocabulary_of(tokenizer, VOCABULARY, llama_base).pre == "gpt-2"
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ExportError, match=r"pre-tokenizer that llama\.cpp knows.*Whitespace"):
        vocabulary_of(tokenizer, VOCABULARY, llama_base)


def test_more_tokens_than_embedding_rows_is_an_error(llama_base: Path) -> None:
    tokenizer = open_tokenizer(read_base_weights(resolve_base(str(llama_base)))).tokenizer
    with pytest.raises(ExportError, match=f"at most {VOCABULARY - 1} tokens"):
        vocabulary_of(tokenizer, VOCABULARY - 1, llama_base)


def test_llama3_frequencies_are_those_of_transformers(llama_base: Path, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 512,
    }
    base = _edited(llama_base, tmp_path / "base", rope_parameters=rope)
    config = transformers.AutoConfig.from_pretrained(tmp_path / "base")
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    plain = 10000.0 ** -(np.arange(0, 16, 2) / 16)
    factors = rope_tensors(settings_of(base))["rope_freqs.weight"]
    np.testing.assert_allclose(plain / factors, expected.numpy(), rtol=1e-5)
    assert factors.max() == pytest.approx(8.0)
    assert rope_tensors(settings_of(read_base_weights(resolve_base(str(llama_base))))) == {}


def test_values_beyond_float16_are_named_or_kept_as_bfloat16(
    qwen_run: OpenRun, tmp_path: Path
) -> None:
    weights = dict(merged_weights(qwen_run, "original"))
    huge = weights[Q_PROJ].clone()
    huge[0, 0] = 1e5
    weights[Q_PROJ] = huge
    path = tmp_path / "model.gguf"
    with pytest.raises(
        Float16RangeError, match=r"blk\.0\.attn_q\.weight is beyond float16's range"
    ):
        write_gguf(path, qwen_run, weights, "f16", facts_of(qwen_run))
    write_gguf(path, qwen_run, weights, "bf16", facts_of(qwen_run))
    assert read_gguf_metadata(path)["general.file_type"] == 32
    huge[0, 0] = float("nan")
    with pytest.raises(ExportError, match="not finite"):
        write_gguf(path, qwen_run, weights, "f32", facts_of(qwen_run))


def test_a_full_disk_leaves_no_file(qwen_run: OpenRun, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    path = tmp_path / "model.gguf"
    weights = merged_weights(qwen_run, "original")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(DiskError, match=r"cannot write .*model\.gguf.*free space"):
            write_gguf(path, qwen_run, weights, "f32", facts_of(qwen_run))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not path.exists()

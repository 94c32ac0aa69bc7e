"""llama.cpp's quantizer: formats by name, metadata kept, verdict rows precise, failures clean."""

from pathlib import Path

import numpy as np
import pytest
from gguf import GGUFReader
from gguf.quants import dequantize
from support.export_run import make_base, make_run

from so8t_eval.backends.gguf_header import read_gguf_metadata, so8t_keys
from so8t_eval.errors import DiskError, ExportError, UsageError
from so8t_train.float_files import facts_of
from so8t_train.gguf_export import write_gguf
from so8t_train.merged_model import merged_weights, open_run
from so8t_train.quantization import FLOAT_FORMATS, FORMATS, parse_quants, quantize_gguf

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

QUANTIZED = [name for name in FORMATS if name not in FLOAT_FORMATS]


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float16 GGUF of 256 features: K-quants need rows of whole 256-blocks."""
    directory = tmp_path_factory.mktemp("quantization")
    base = make_base(
        directory / "base", "llama", hidden_size=256, intermediate_size=256, head_dim=64
    )
    run = open_run(make_run(directory / "run", base, load_in_8bit=False))
    path = directory / "model-F16.gguf"
    write_gguf(path, run, merged_weights(run, "original"), "f16", facts_of(run))
    return path


@pytest.mark.parametrize("name", QUANTIZED)
def test_a_quantized_file_keeps_keys_and_precise_rows(
    name: str, wide: Path, tmp_path: Path
) -> None:
    target = tmp_path / f"{name}.gguf"
    quantize_gguf(wide, target, FORMATS[name], 1)
    before, after = read_gguf_metadata(wide), read_gguf_metadata(target)
    assert so8t_keys(target, after) == so8t_keys(wide, before)
    assert after["general.file_type"] == FORMATS[name].file_type
    changed = {"general.file_type", "general.quantization_version"}
    assert {k: v for k, v in after.items() if k not in changed} == {
        k: v for k, v in before.items() if k not in changed
    }
    tensors = {tensor.name: tensor for tensor in GGUFReader(target).tensors}
    rows = tensors["token_embd.weight"]
    assert rows.tensor_type.name == "Q8_0"
    originals = {tensor.name: tensor for tensor in GGUFReader(wide).tensors}
    exact = np.array(originals["token_embd.weight"].data[-3:], dtype=np.float32)
    stored = dequantize(rows.data, rows.tensor_type)[-3:]
    assert np.abs(stored - exact).max() <= np.abs(exact).max() / 127
    assert tensors["output_norm.weight"].tensor_type.name == "F32"
    expected = {"q6_k": "Q6_K", "q5_k_m": "Q5_K", "q4_k_m": "Q4_K", "q4_0": "Q4_0", "q8_0": "Q8_0"}
    expected |= {"iq4_xs": "IQ4_XS", "q3_k_m": "Q3_K"}
    assert tensors["blk.0.attn_q.weight"].tensor_type.name == expected[name]


def test_names_on_the_command_line() -> None:
    assert [quant.label for quant in parse_quants("F16, q8_0,q4_k_m")] == ["F16", "Q8_0", "Q4_K_M"]
    for text in ("q3_k", "", ",", "f16,f16"):
        with pytest.raises(UsageError, match="--quant"):
            parse_quants(text)


def test_a_broken_source_is_told_of(tmp_path: Path) -> None:
    source = tmp_path / "model-F16.gguf"
    source.write_bytes(b"GGUF and nothing more")
    with pytest.raises(ExportError, match=r"cannot quantize model-F16\.gguf to Q8_0: \w+"):
        quantize_gguf(source, tmp_path / "out.gguf", FORMATS["q8_0"], 1)
    assert not (tmp_path / "out.gguf").exists()


def test_a_full_disk_leaves_no_file(wide: Path, tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(DiskError, match=r"cannot write .*out\.gguf.*free space"):
            quantize_gguf(wide, tmp_path / "out.gguf", FORMATS["q8_0"], 1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not (tmp_path / "out.gguf").exists()

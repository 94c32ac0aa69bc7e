"""GGUF headers: what is read, and how each broken file is explained."""

from pathlib import Path

import pytest
from support.tiny_gguf import CHAT_TEMPLATE, verdict_ids, write_tiny_gguf

from so8t_eval.backends.gguf_header import read_gguf_metadata, so8t_keys
from so8t_eval.errors import ModelFileError


def test_metadata_matches_what_was_written(tiny_gguf: Path) -> None:
    metadata = read_gguf_metadata(tiny_gguf)
    assert metadata["general.architecture"] == "llama"
    assert metadata["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert metadata["llama.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)
    assert "tokenizer.ggml.tokens" not in metadata
    assert so8t_keys(tiny_gguf, metadata).verdict_tokens == tuple(verdict_ids())


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "not a GGUF"), (b"PK\x03\x04 zip", "not a GGUF"), (b"GGUF", "cut short"),
     (b"GGUF\x01\0\0\0" + b"\0" * 16, "version 2 or 3, found 1")],
)  # fmt: skip
def test_file_of_another_kind_is_refused(tmp_path: Path, content: bytes, problem: str) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=problem):
        read_gguf_metadata(path)


def test_missing_file_and_directory_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file"):
        read_gguf_metadata(tmp_path / "none.gguf")
    with pytest.raises(ModelFileError, match="is a directory"):
        read_gguf_metadata(tmp_path)


@pytest.mark.parametrize("length", [10, 30, 200, 1500, 3000])
def test_header_cut_anywhere_is_refused(tiny_gguf: Path, tmp_path: Path, length: int) -> None:
    path = tmp_path / "cut.gguf"
    path.write_bytes(tiny_gguf.read_bytes()[:length])
    with pytest.raises(ModelFileError, match="cut short"):
        read_gguf_metadata(path)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"so8t_keys": False}, "not an SO8T export"),
        ({"format_version": 99}, "expected so8t.format_version 1, found 99"),
        ({"verdict_tokens": [5, 5, 6]}, "three different token ids"),
        ({"verdict_tokens": [5, 6]}, "three different token ids"),
    ],
)
def test_wrong_so8t_keys_are_refused(
    tmp_path: Path, changes: dict[str, object], problem: str
) -> None:
    path = write_tiny_gguf(tmp_path / "model.gguf", **changes)  # type: ignore[arg-type]
    with pytest.raises(ModelFileError, match=problem):
        so8t_keys(path, read_gguf_metadata(path))

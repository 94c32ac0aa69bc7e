"""Give a copy of any GGUF file verdict tokens and SO8T keys, without rewriting its tensors."""

import struct
from pathlib import Path

from so8t_eval.backends.gguf_header import (
    FORMAT_VERSION,
    KEY_FORMAT_VERSION,
    KEY_PROTOCOL_HASH,
    KEY_VERDICT_TOKENS,
)
from so8t_eval.labels import VERDICT_TOKENS

ALIGNMENT = 32


def _string(text: str) -> bytes:
    raw = text.encode("utf-8")
    return struct.pack("<Q", len(raw)) + raw


def uint32(key: str, value: int) -> bytes:
    return _string(key) + struct.pack("<II", 4, value)


def string(key: str, value: str) -> bytes:
    return _string(key) + struct.pack("<I", 8) + _string(value)


def int32_array(key: str, values: list[int]) -> bytes:
    return _string(key) + struct.pack(f"<IIQ{len(values)}i", 9, 5, len(values), *values)


def patch_gguf(
    source: Path,
    target: Path,
    *,
    protocol_hash: str,
    verdict_ids: list[int],
    renamed: list[str],
    format_version: int = FORMAT_VERSION,
) -> None:
    """Write ``source`` to ``target`` with three unused tokens renamed to verdicts, and the keys.

    Tensor offsets are relative to an aligned start, so the header may grow by whole alignments.
    """
    content = source.read_bytes()
    before = len(content)
    for old, new in zip(renamed, VERDICT_TOKENS, strict=True):
        content = content.replace(_string(old), _string(new), 1)
    added = [
        uint32(KEY_FORMAT_VERSION, format_version),
        string(KEY_PROTOCOL_HASH, protocol_hash),
        int32_array(KEY_VERDICT_TOKENS, verdict_ids),
    ]
    grown = len(content) - before + sum(map(len, added))
    filler_head = len(string("test.filler", ""))
    added.append(string("test.filler", "x" * (-(grown + filler_head) % ALIGNMENT)))
    (n_keys,) = struct.unpack_from("<Q", content, 16)
    target.write_bytes(
        content[:16] + struct.pack("<Q", n_keys + len(added)) + b"".join(added) + content[24:]
    )

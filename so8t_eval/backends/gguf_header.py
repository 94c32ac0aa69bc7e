"""The metadata of a GGUF file, and the keys by which SO8T marks its own.

Reads the header alone, without weights and without building the vocabulary, so that a wrong file
is explained before a model is loaded. Source: the GGUF specification, version 3.
"""

import glob
import mmap
import struct
from pathlib import Path
from typing import Final, NamedTuple

from so8t_eval.errors import ModelFileError
from so8t_eval.labels import SEVERITY_ORDER
from so8t_eval.operating_point import parse_points

KEY_FORMAT_VERSION: Final = "so8t.format_version"
KEY_PROTOCOL_HASH: Final = "so8t.protocol_hash"
KEY_VERDICT_TOKENS: Final = "so8t.verdict.tokens"
KEY_BASE_MODEL: Final = "so8t.base_model"
KEY_ADAPTER_SHA256: Final = "so8t.adapter_sha256"
KEY_TEMPERATURE: Final = "so8t.temperature"
KEY_OPERATING_POINTS: Final = "so8t.operating_points"
FORMAT_VERSION: Final = 1

MetadataValue = str | int | float | bool | list[str] | list[int] | list[float] | list[bool]

_MAGIC: Final = b"GGUF"
_SCALARS: Final = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
_STRING: Final = 8
_ARRAY: Final = 9
_LONGEST_ARRAY_READ: Final = 64
"""Longer arrays (vocabulary, merges) are skipped: nothing here needs them."""


class So8tKeys(NamedTuple):
    """What an exported GGUF says about itself. ``verdict_tokens`` are ids in severity order."""

    protocol_hash: str
    verdict_tokens: tuple[int, int, int]
    temperature: float | None
    base_model: str | None
    operating_points: dict[str, float]
    """Bias on the allow logit by name; empty in files that carry none."""


def read_gguf_metadata(path: Path) -> dict[str, MetadataValue]:
    """Return the key-value metadata of a GGUF file, without arrays longer than 64 elements.

    Raises:
        ModelFileError: missing, unreadable, not a GGUF file of version 2 or 3, or cut short.
    """
    if path.is_dir():
        raise ModelFileError(f"{path} is a directory; expected a .gguf file")
    try:
        with path.open("rb") as stream:
            if stream.read(4) != _MAGIC:
                raise ModelFileError(
                    f"{path} is not a GGUF file (it does not begin with the bytes GGUF); "
                    "give a .gguf file written by so8t-train export"
                )
            with mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return _Reader(content).metadata(path)
    except FileNotFoundError as error:
        parts = sorted(path.parent.glob(f"{glob.escape(path.stem)}-00001-of-*.gguf"))
        hint = f"it was split, give {parts[0].name}" if parts else "check the path after llamacpp:"
        raise ModelFileError(f"{path}: no such file; {hint}") from error
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}") from error
    except (struct.error, UnicodeDecodeError, KeyError) as error:
        raise ModelFileError(
            f"{path} is broken or cut short in its header ({error}); copy or export it again"
        ) from error


def so8t_keys(path: Path, metadata: dict[str, MetadataValue]) -> So8tKeys:
    """Return the SO8T keys of a GGUF file's metadata, checked.

    Raises:
        ModelFileError: the keys are missing, malformed, or of another format version.
    """
    version = metadata.get(KEY_FORMAT_VERSION)
    if version is None:
        raise ModelFileError(
            f"{path} has no {KEY_FORMAT_VERSION} key: it is not an SO8T export; "
            "train an adapter and write the file with so8t-train export"
        )
    if version != FORMAT_VERSION:
        raise ModelFileError(
            f"{path}: expected {KEY_FORMAT_VERSION} {FORMAT_VERSION}, found {version}; "
            "export it again with this version, or use the SO8T version that wrote it"
        )
    protocol_hash, tokens = metadata.get(KEY_PROTOCOL_HASH), metadata.get(KEY_VERDICT_TOKENS)
    if not isinstance(protocol_hash, str):
        raise _malformed(path, KEY_PROTOCOL_HASH, "a SHA-256 text", protocol_hash)
    ids = [token for token in tokens if type(token) is int] if isinstance(tokens, list) else []
    if (
        not isinstance(tokens, list)
        or len(ids) != len(tokens)
        or len(set(ids)) != len(SEVERITY_ORDER)
    ):
        raise _malformed(path, KEY_VERDICT_TOKENS, "three different token ids", tokens)
    temperature, base_model = metadata.get(KEY_TEMPERATURE), metadata.get(KEY_BASE_MODEL)
    return So8tKeys(
        protocol_hash,
        (ids[0], ids[1], ids[2]),
        float(temperature) if isinstance(temperature, (int, float)) else None,
        base_model if isinstance(base_model, str) else None,
        _operating_points(path, metadata.get(KEY_OPERATING_POINTS, "{}")),
    )


def _operating_points(path: Path, value: MetadataValue) -> dict[str, float]:
    try:
        return parse_points(str(value))
    except (ValueError, TypeError) as error:
        raise _malformed(path, KEY_OPERATING_POINTS, "named biases as JSON", value) from error


def _malformed(path: Path, key: str, expected: str, found: object) -> ModelFileError:
    return ModelFileError(
        f"{path}: {key}: expected {expected}, found {found!r}; export the file again"
    )


class _Reader:
    """A cursor over a GGUF header."""

    def __init__(self, content: mmap.mmap) -> None:
        self._content = content
        self._at = len(_MAGIC)

    def metadata(self, path: Path) -> dict[str, MetadataValue]:
        version = self._scalar("<I")
        if version not in (2, 3):
            raise ModelFileError(
                f"{path}: expected GGUF version 2 or 3, found {version}; convert it again"
            )
        self._scalar("<Q")  # number of tensors
        values: dict[str, MetadataValue] = {}
        for _ in range(int(self._scalar("<Q"))):
            key = self._string()
            value = self._value(int(self._scalar("<I")))
            if value is not None:
                values[key] = value
        return values

    def _value(self, kind: int) -> MetadataValue | None:
        if kind == _STRING:
            return self._string()
        return self._array() if kind == _ARRAY else self._scalar(_SCALARS[kind])

    def _array(self) -> MetadataValue | None:
        kind, length = int(self._scalar("<I")), int(self._scalar("<Q"))
        if length <= _LONGEST_ARRAY_READ:
            # One kind per array, by the format.
            return [self._value(kind) for _ in range(length)]  # type: ignore[return-value]
        if kind == _STRING:
            for _ in range(length):
                self._skip(int(self._scalar("<Q")))
        else:
            self._skip(length * struct.calcsize(_SCALARS[kind]))
        return None

    def _scalar(self, form: str) -> int | float | bool:
        value: int | float | bool = struct.unpack_from(form, self._content, self._at)[0]
        self._at += struct.calcsize(form)
        return value

    def _string(self) -> str:
        length = int(self._scalar("<Q"))
        start = self._at
        self._skip(length)
        return self._content[start : self._at].decode("utf-8")

    def _skip(self, length: int) -> None:
        self._at += length
        if self._at > len(self._content):
            raise struct.error(f"ends at byte {len(self._content)}")

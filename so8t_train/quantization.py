"""Quantize a float GGUF file with llama.cpp's own quantizer."""

import ctypes
import errno
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import llama_cpp.llama_cpp as c_api

from so8t_eval.backends.llamacpp_context import mute_logs
from so8t_eval.errors import DiskError, ExportError, UsageError
from so8t_train.gguf_export import Progress, disk_error, sync_file
from so8t_train.importance import ImportanceMatrix

_Q8_0: Final = 8
_LEAST_FREE_BYTES: Final = 1 << 20
_BUFFER_BYTES: Final = 1 << 26
_STEP: Final = re.compile(r"\[\s*(\d+)/\s*(\d+)\]")


class QuantFormat(NamedTuple):
    """A quantization: its name on the command line and in file names, and llama.cpp's number.

    ``rows_type`` is ggml's number of the type of embedding and output matrices, None: llama.cpp's
    choice, which is six bits, or Q8_0 where rows are no multiple of 256. Here it is Q8_0: the three
    verdict rows lie there, and with tied embeddings nowhere else. Measured on the reference model as
    Q4_K_M (mean verdict-probability difference on 60 dev cases): F16 0.057, Q8_0 0.059, Q5_0 0.054,
    Q4_0 0.057. So these rows hardly matter beside the other layers' four bits; Q8_0 costs a seventh
    more size than Q4_0 and leaves the verdict as written.
    """

    name: str
    label: str
    file_type: int
    rows_type: int | None = None

    @property
    def uses_importance(self) -> bool:
        """Whether llama.cpp weighs its rounding errors where it is given an importance matrix."""
        return self.name not in (*FLOAT_FORMATS, "q8_0")


FLOAT_FORMATS: Final = ("f32", "f16", "bf16")
FORMATS: Final = {
    item.name: item
    for item in (
        QuantFormat("f32", "F32", 0),
        QuantFormat("f16", "F16", 1),
        QuantFormat("bf16", "BF16", 32),
        QuantFormat("q8_0", "Q8_0", 7),
        QuantFormat("q6_k", "Q6_K", 18, rows_type=_Q8_0),
        QuantFormat("q5_k_m", "Q5_K_M", 17, rows_type=_Q8_0),
        QuantFormat("q4_k_m", "Q4_K_M", 15, rows_type=_Q8_0),
        QuantFormat("q4_0", "Q4_0", 2, rows_type=_Q8_0),
        QuantFormat("iq4_xs", "IQ4_XS", 30, rows_type=_Q8_0),
        QuantFormat("q3_k_m", "Q3_K_M", 12, rows_type=_Q8_0),
    )
}


def parse_quants(text: str) -> list[QuantFormat]:
    """The formats that ``--quant f16,q8_0`` names, in that order.

    Raises:
        UsageError: an unknown or repeated name, or none.
    """
    names = [name.strip().lower() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in FORMATS:
            raise UsageError(f"--quant: expected names among {', '.join(FORMATS)}, found {name!r}")
    if not names or len(set(names)) != len(names):
        raise UsageError(f"--quant: expected different names, comma-separated, found {text!r}")
    return [FORMATS[name] for name in names]


def quantize_gguf(
    source: Path,
    target: Path,
    quant: QuantFormat,
    threads: int,
    progress: Progress = lambda _share: None,
    *,
    importance: ImportanceMatrix | None = None,
) -> None:
    """Write ``source`` (F16, BF16 or F32) to ``target`` in another format; metadata are kept.

    ``progress`` is told the share of tensors that is done. ``importance`` weighs the rounding errors
    of the tensors it names; llama.cpp uses it below Q8_0.

    Raises:
        DiskError: no room for the file; what was written is removed.
        ExportError: llama.cpp cannot quantize it, with its reason.
    """
    parameters = c_api.llama_model_quantize_default_params()
    parameters.nthread = threads
    parameters.ftype = quant.file_type
    if hasattr(parameters, "max_buf_size"):  # older versions map the file and hold whole tensors
        parameters.max_buf_size = _BUFFER_BYTES
    if quant.rows_type is not None:
        parameters.token_embedding_type = parameters.output_tensor_type = quant.rows_type
    entries = importance_entries(importance) if importance is not None else None
    if entries is not None:
        parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
    with _collected_log(progress) as log:
        code = c_api.llama_model_quantize(
            os.fsencode(source), os.fsencode(target), ctypes.byref(parameters)
        )
    if code == 0:
        sync_file(target)
        return
    target.unlink(missing_ok=True)
    reason = _reason("".join(log))
    # llama.cpp tells of a failed write only as "iostream error", without the system's reason.
    if "iostream error" in reason or shutil.disk_usage(target.parent).free < _LEAST_FREE_BYTES:
        raise DiskError(str(disk_error(target, OSError(errno.ENOSPC, "no room to write the file"))))
    raise ExportError(f"llama.cpp cannot quantize {source.name} to {quant.label}: {reason}")


def importance_entries(importance: ImportanceMatrix) -> Any:
    """A C array of ``llama_model_imatrix_data`` that ends with an entry without a name.

    It points to the matrix's own numbers, which must outlive it.

    Raises:
        ExportError: the installed llama-cpp-python cannot be given one.
    """
    check_takes_importance()
    array = (c_api.llama_model_imatrix_data * (len(importance.values) + 1))()
    pointer = ctypes.POINTER(ctypes.c_float)
    for place, (name, values) in zip(array, importance.values.items(), strict=False):
        place.name = name.encode()
        place.data, place.size = values.ctypes.data_as(pointer), values.size
    return array


def check_takes_importance() -> None:
    """Refuse a llama-cpp-python whose quantizer takes no importance matrix from Python.

    Raises:
        ExportError: with what to do.
    """
    if not hasattr(c_api, "llama_model_imatrix_data"):
        raise ExportError(
            f"llama-cpp-python {version('llama-cpp-python')}: expected llama_model_imatrix_data, by "
            "which it is given importance matrices, found none; pip install -U llama-cpp-python, or "
            "export with --no-imatrix"
        )


@contextmanager
def _collected_log(progress: Progress) -> Iterator[list[str]]:
    lines: list[str] = []

    @c_api.llama_log_callback  # type: ignore[untyped-decorator]
    def collect(_level: int, text: bytes, _data: object) -> None:
        lines.append(text.decode("utf-8", "replace"))
        if step := _STEP.match(lines[-1]):
            progress(int(step[1]) / int(step[2]))

    c_api.llama_log_set(collect, ctypes.c_void_p(0))
    try:
        yield lines
    finally:
        mute_logs()


def _reason(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    telling = [line for line in lines if "error" in line.lower() or "fail" in line.lower()]
    return (telling or lines or ["no reason given"])[-1]

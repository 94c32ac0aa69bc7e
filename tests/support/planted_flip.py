"""Plant verdict flips: a GGUF file whose verdict rows are exchanged, and a ladder of given files."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gguf import GGUFReader

from so8t_eval.backends.gguf_header import read_gguf_metadata, so8t_keys
from so8t_eval.backends.registry import ModelSpec
from so8t_eval.drift_ladder import Ladder, LadderModel


def swap_allow_and_refuse(source: Path, target: Path) -> Path:
    """Copy a GGUF of any tensor type so that it says refuse for allow and vice versa.

    The verdict rows are exchanged in the output matrix, or in tied embeddings.
    """
    keys = so8t_keys(source, read_gguf_metadata(source))
    content = bytearray(source.read_bytes())
    tensors = {tensor.name: tensor for tensor in GGUFReader(source).tensors}
    matrix = tensors.get("output.weight", tensors["token_embd.weight"])
    start, row_bytes = int(matrix.data_offset), int(matrix.n_bytes) // int(matrix.shape[1])
    allow, _, refuse = (
        slice(start + token * row_bytes, start + (token + 1) * row_bytes)
        for token in keys.verdict_tokens
    )
    content[allow], content[refuse] = content[refuse], content[allow]
    target.write_bytes(content)
    return target


def ladder_of(files: dict[str, Path], directory: Path) -> Ladder:
    """A ladder whose steps are files that exist."""
    models = (LadderModel(step, ModelSpec("llamacpp", path)) for step, path in files.items())
    return Ladder(directory, models)


def opener(files: dict[str, Path]) -> Callable[..., object]:
    """``open_ladder`` of a provider that exports nothing and offers ``files``, by step."""

    @contextmanager
    def open_ladder(
        run: Path,
        steps: Sequence[str],
        *,
        keep: Path | None,
        threads: int,
        report: Callable[[str], None],
    ) -> Iterator[Ladder]:
        report(f"exporting {run.name} with {threads} threads")
        with tempfile.TemporaryDirectory() as temporary:
            chosen = {step: files[step] for step in steps}
            yield ladder_of(chosen, Path(temporary) if keep is None else keep)

    return open_ladder

"""The export as a whole: what it leaves behind when it works, fails, or is interrupted."""

import errno
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import filelock
import pytest
import torch
import transformers
from click.testing import CliRunner
from gguf import GGUFReader
from llama_cpp import Llama
from safetensors.torch import load_file, save_file
from support.export_run import calibration_file, make_base, make_run

from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.backends.registry import open_backend, parse_model
from so8t_eval.errors import BackendError, DiskError, ExportError, UsageError
from so8t_eval.file_hash import file_sha256
from so8t_eval.labels import VERDICT_TOKENS
from so8t_train import export as export_module
from so8t_train import export_files
from so8t_train.certificate import Certificate
from so8t_train.cli import main
from so8t_train.export import ExportOptions, export, export_reference_gguf
from so8t_train.export_staging import staged
from so8t_train.gguf_export import Float16RangeError
from so8t_train.unfinished_export import unfinished_directory

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("export")
    base = make_base(directory / "base", "qwen2", tied=False, spare_rows=7)
    return make_run(directory / "run", base, load_in_8bit=False)


@pytest.fixture
def options(tmp_path_factory: pytest.TempPathFactory) -> ExportOptions:
    file = calibration_file(tmp_path_factory.mktemp("cases"))
    return ExportOptions(quants="q8_0", calibration=file, threads=1)


@contextmanager
def _file_size_limit(limit: int) -> Iterator[None]:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def _raise(error: BaseException) -> Callable[..., None]:
    def fail(*_arguments: Any, **_options: Any) -> None:
        raise error

    return fail


def test_an_export_leaves_files_and_certificate(
    run: Path, options: ExportOptions, tmp_path: Path
) -> None:
    lines: list[str] = []
    result = export(run, tmp_path / "out", options._replace(quants="q8_0,bf16"), lines.append)
    names = sorted(path.name for path in result.directory.iterdir())
    assert names == ["certificate.json", "model-BF16.gguf", "model-Q8_0.gguf"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    text = (result.directory / "certificate.json").read_text(encoding="utf-8")
    certificate = Certificate.model_validate_json(text)
    assert certificate == result.certificate
    assert certificate.passed
    assert certificate.calibration.n == 9
    assert options.calibration is not None
    assert certificate.calibration.sha256 == file_sha256(options.calibration)
    assert certificate.run.parts["so8t.json"] == file_sha256(run / "so8t.json")
    assert [(file.format, file.kept) for file in certificate.files] == [
        ("F16", False),
        ("Q8_0", True),
        ("BF16", True),
    ]
    for file in certificate.files:
        if file.kept:
            assert file.sha256 == file_sha256(result.directory / file.file)
    assert any("model-Q8_0.gguf" in line for line in lines)


def test_a_hugging_face_export_loads_plainly(
    run: Path, options: ExportOptions, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    export(run, out, options._replace(format="hf", quants="bf16"))
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        out, output_loading_info=True
    )
    assert model.dtype == torch.bfloat16
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(out)
    facts = json.loads((out / "so8t_model.json").read_text(encoding="utf-8"))
    assert tokenizer.convert_tokens_to_ids(list(VERDICT_TOKENS)) == facts["verdict_token_ids"]
    assert model.config.vocab_size == max(facts["verdict_token_ids"]) + 1
    assert set(VERDICT_TOKENS) <= set(tokenizer.all_special_tokens) | set(
        tokenizer.get_added_vocab()
    )
    text = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)
    assert text.startswith("<|im_start|>user\nHi")
    backend = open_backend(parse_model(f"torch:{out}"), threads=1)
    assert backend.tokenize(VERDICT_TOKENS[1], True) == [facts["verdict_token_ids"][1]]
    assert facts["verdict_token_ids"][1] not in backend.tokenize(VERDICT_TOKENS[1], False)
    backend.close()


def test_the_merge_base_is_the_runs_unless_asked(tmp_path: Path, options: ExportOptions) -> None:
    base = make_base(tmp_path / "base", "llama")
    run = make_run(tmp_path / "run", base, merge_base="dequant8")
    certificate = export(run, tmp_path / "a", options).certificate
    assert certificate.merge_base == "dequant8"
    assert set(certificate.merge_bases) == {"original", "dequant8"}
    kept, lost = certificate.merge_bases["dequant8"], certificate.merge_bases["original"]
    assert kept.from_trained.max_probability_difference < 1e-5
    assert lost.from_trained.max_probability_difference > 1e-4
    assert kept.weight_distance_mean > 1e-3
    assert lost.weight_distance_max == 0
    asked = export(run, tmp_path / "b", options._replace(merge_base="original")).certificate
    assert asked.merge_base == "original"


def test_a_directory_with_content_is_refused_before_work(
    run: Path, options: ExportOptions, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "certificate.failed.json").write_text("{}", encoding="utf-8")
    (out / "notes.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(UsageError, match=r"found notes\.txt"):
        export(run, out, options)
    assert (out / "notes.txt").read_text(encoding="utf-8") == "mine"
    (out / "notes.txt").unlink()
    export(run, out, options)
    assert sorted(path.name for path in out.iterdir()) == ["certificate.json", "model-Q8_0.gguf"]
    with pytest.raises(UsageError, match="expected a directory, found a file"):
        export(run, out / "certificate.json", options)


@pytest.mark.parametrize("quants", ["q8_0", "f16,f32"])
def test_a_hugging_face_export_has_one_float_format(
    run: Path, quants: str, options: ExportOptions, tmp_path: Path
) -> None:
    with pytest.raises(UsageError, match="with --format hf"):
        export(run, tmp_path / "out", options._replace(format="hf", quants=quants))


INTERRUPTS = [KeyboardInterrupt(), BackendError("llama.cpp failed"), MemoryError()]


@pytest.mark.parametrize("error", INTERRUPTS)
def test_an_interrupt_before_the_first_whole_file_leaves_nothing(
    run: Path,
    error: BaseException,
    options: ExportOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(export_files, "write_quantizer_source", _raise(error))
    with pytest.raises(type(error)):
        export(run, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(export_module, "quantize_gguf", _raise(error))
    with pytest.raises(type(error)):
        export_reference_gguf(run, tmp_path / "reference.gguf")
    assert list(tmp_path.iterdir()) == []


class _Interrupted(NamedTuple):
    """An export that was interrupted, and what it was told to do."""

    target: Path
    options: ExportOptions
    kept: Path


@pytest.fixture
def interrupted(
    run: Path, options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> _Interrupted:
    """Interrupted after F16 and BF16 are whole and run, in the middle of Q8_0."""
    wanted = options._replace(quants="f16,bf16,q8_0")

    def half(_source: Path, target: Path, *_arguments: Any, **_named: Any) -> None:
        target.write_bytes(b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(export_files, "quantize_gguf", half)
        with pytest.raises(KeyboardInterrupt):
            export(run, tmp_path / "out", wanted)
    return _Interrupted(tmp_path / "out", wanted, unfinished_directory(tmp_path / "out"))


def _files(directory: Path) -> dict[str, str]:
    return {path.name: file_sha256(path) for path in directory.glob("*.gguf")}


@pytest.mark.parametrize("error", INTERRUPTS)
def test_a_resumed_export_makes_only_what_is_missing(
    run: Path,
    error: BaseException,
    interrupted: _Interrupted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    target, options, kept = interrupted
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    again = options._replace(resume=True)
    lines: list[str] = []
    with monkeypatch.context() as patched:
        patched.setattr(export_files, "quantize_gguf", _raise(error))
        with pytest.raises(type(error)):  # once more: nothing is lost by it
            export(run, target, again, lines.append)
    assert "kept in" in lines[-1]
    assert "--resume" in lines[-1]
    lines.clear()
    result = export(run, target, again, lines.append)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    made = [line for line in lines if line.startswith(("writing", "running"))]
    assert made == ["writing model-Q8_0.gguf", "running 9 cases on model-Q8_0.gguf"]
    whole = export(run, tmp_path / "whole", options)
    assert _files(target) == _files(tmp_path / "whole")
    assert sorted(path.name for path in target.iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )
    assert result.certificate == whole.certificate


def test_an_unfinished_export_is_not_touched_unasked(run: Path, interrupted: _Interrupted) -> None:
    target, options, kept = interrupted
    before = _files(kept)
    with pytest.raises(UsageError, match="add --resume to go on with it, or delete it"):
        export(run, target, options)
    others = {
        "--quant": options._replace(quants="f16"),
        "--split-max-size": options._replace(split_max_size="1G"),
    }
    for name, other in others.items():
        with pytest.raises(UsageError, match=f"differs in {name};"):
            export(run, target, other._replace(resume=True))
    assert _files(kept) == before
    lock = filelock.FileLock(kept / "export.lock")
    with lock, pytest.raises(UsageError, match="another process is exporting there"):
        export(run, target, options._replace(resume=True))
    assert _files(kept) == before


def test_a_damaged_file_of_an_unfinished_export_is_made_again(
    run: Path, interrupted: _Interrupted, tmp_path: Path
) -> None:
    target, options, kept = interrupted
    with (kept / "model-BF16.gguf").open("r+b") as stream:
        stream.seek(-1, os.SEEK_END)
        last = stream.read(1)
        stream.seek(-1, os.SEEK_END)
        stream.write(bytes([last[0] ^ 1]))
    (kept / "model-F16.gguf").unlink()
    lines: list[str] = []
    export(run, target, options._replace(resume=True), lines.append)
    assert [line.split()[0] for line in lines if "is damaged" in line] == [
        "model-F16.gguf",
        "model-BF16.gguf",
    ]
    export(run, tmp_path / "whole", options)
    assert _files(target) == _files(tmp_path / "whole")


def test_a_failed_certificate_leaves_no_unfinished_export(
    run: Path, options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_files, "backend_outputs", _raise(ExportError("other tokens")))
    with pytest.raises(ExportError):
        export(run, tmp_path / "out", options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("form", "quants"), [("gguf", "f16"), ("gguf", "q8_0"), ("hf", "f32")])
def test_a_full_disk_leaves_nothing(
    run: Path, form: Any, quants: str, options: ExportOptions, tmp_path: Path
) -> None:
    with _file_size_limit(100_000), pytest.raises(DiskError, match="free space"):
        export(run, tmp_path / "out", options._replace(format=form, quants=quants))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("labels", [["Q8_0"], ["F16", "Q8_0"], ["BF16"]])
def test_what_is_kept_is_on_the_disk_before_it_gets_its_name(
    run: Path,
    labels: list[str],
    options: ExportOptions,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    quants = ",".join(labels).lower()
    waited: list[str] = []

    def fsync(descriptor: int) -> None:
        waited.append(Path(f"/proc/self/fd/{descriptor}").readlink().name)

    if not Path("/proc/self/fd").is_dir():
        pytest.skip("file names of descriptors are read from /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    export(run, tmp_path / "out", options._replace(quants=quants, certificate="none"))
    ggufs = sorted(name for name in waited if name.endswith(".gguf"))
    assert ggufs == [f"model-{label}.gguf" for label in labels]


def test_a_file_that_cannot_reach_the_disk_leaves_nothing(
    run: Path, options: ExportOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", _raise(OSError(errno.ENOSPC, "No space left on device")))
    for quants in ("f16", "q8_0", "q8_0,f16"):
        with pytest.raises(DiskError, match="No space left on device"):
            export(run, tmp_path / "out", options._replace(quants=quants, certificate="none"))
        assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(DiskError, match="cannot write"), staged(tmp_path / "file" / "out"):
        pytest.fail("the stage was made below a file")


def test_the_reference_gguf_is_an_ordinary_export(run: Path, tmp_path: Path) -> None:
    path = export_reference_gguf(run, tmp_path / "cache" / "reference.gguf")
    assert [item.name for item in path.parent.iterdir()] == ["reference.gguf"]
    backend = LlamaCppBackend(path, threads=1)
    assert backend.info.model == "reference.gguf"
    backend.close()


def test_the_command_reports_files_and_certificate(
    run: Path, options: ExportOptions, tmp_path: Path
) -> None:
    arguments = ["export", str(run), "-o", str(tmp_path / "out"), "--quant", "q8_0"]
    arguments += ["--calibration", str(options.calibration), "--calibration-cases", "6"]
    result = CliRunner().invoke(main, [*arguments, "--threads", "1"])
    assert result.exit_code == 0, result.output
    assert "model-Q8_0.gguf  0 MB  verdict probabilities within" in result.stdout
    assert "of 6 verdicts flipped" in result.stdout
    assert "certificate passed" in result.stdout
    assert "merging LoRA" in result.stderr
    again = CliRunner().invoke(main, arguments)
    assert again.exit_code == 2
    assert "expected a new or empty directory" in again.stderr


def test_a_missing_run_is_a_run_time_error(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["export", str(tmp_path / "none"), "-o", str(tmp_path / "o")])
    assert result.exit_code == 3
    assert "is not a directory" in result.stderr


def test_without_a_model_run_the_files_are_the_same(
    run: Path, options: ExportOptions, tmp_path: Path
) -> None:
    full = export(run, tmp_path / "full", options._replace(quants="q8_0,f32"))
    weights = export(
        run, tmp_path / "w", options._replace(quants="q8_0,f32", certificate="weights")
    )
    none = export(run, tmp_path / "none", options._replace(quants="q8_0,f32", certificate="none"))
    for name in ("model-Q8_0.gguf", "model-F32.gguf"):
        expected = (full.directory / name).read_bytes()
        assert (weights.directory / name).read_bytes() == expected
        assert (none.directory / name).read_bytes() == expected
    names = sorted(path.name for path in none.directory.iterdir())
    assert names == ["certificate.json", "model-F32.gguf", "model-Q8_0.gguf"]
    found = weights.certificate
    assert (found.level, found.passed, found.calibration) == ("weights", True, None)
    assert [item.name for item in found.checks] == [
        "rotation orthogonality",
        "rotation determinant",
        "merged weight",
    ]
    assert (none.certificate.level, none.certificate.passed) == ("none", None)
    assert none.certificate.checks == []
    for file in found.files:
        assert file.difference is None
        assert file.sha256 == file_sha256(weights.directory / file.file)


def test_large_files_are_split_and_llama_cpp_loads_them(
    run: Path, options: ExportOptions, tmp_path: Path
) -> None:
    split = options._replace(quants="f16,q8_0", split_max_size="100K")
    result = export(run, tmp_path / "split", split)
    whole = export(run, tmp_path / "whole", options._replace(quants="f16,q8_0"))
    for one, other in zip(result.certificate.files, whole.certificate.files, strict=True):
        assert one.difference == other.difference
        parts = [one.file, *one.further_parts]
        assert len(parts) > 1
        pattern = f"model-{one.format}-0000?-of-0000{len(parts)}.gguf"
        assert parts == sorted(path.name for path in result.directory.glob(pattern))
        assert one.further_parts[parts[-1]] == file_sha256(result.directory / parts[-1])
        assert _tensors(result.directory, parts) == _tensors(whole.directory, [other.file])
        native = Llama(str(result.directory / parts[0]), n_ctx=64, verbose=False)
        assert len(native.create_completion([0, 1, 2], max_tokens=1)["choices"]) == 1
        native.close()
    assert not list(result.directory.glob("model-F16.gguf"))


def _tensors(directory: Path, parts: list[str]) -> dict[str, bytes]:
    return {
        tensor.name: tensor.data.tobytes()
        for part in parts
        for tensor in GGUFReader(directory / part).tensors
    }


@pytest.mark.parametrize("size", ["2", "1.5G", "G", "0M"])
def test_a_size_that_is_none_is_an_error(run: Path, size: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--split-max-size: expected a size such as 500M"):
        export(run, tmp_path / "out", ExportOptions(split_max_size=size))
    with pytest.raises(UsageError, match="--format gguf only"):
        export(run, tmp_path / "out", ExportOptions(format="hf", split_max_size="2G"))


def test_weights_beyond_float16_are_quantized_from_float32(
    options: ExportOptions, tmp_path: Path
) -> None:
    base = make_base(tmp_path / "base", "llama")
    file = base / "model.safetensors"
    weights = load_file(file)
    weights["model.embed_tokens.weight"][0, 0] = 1e5
    save_file(weights, file, metadata={"format": "pt"})
    run = make_run(tmp_path / "run", base, load_in_8bit=False)
    weak = options._replace(certificate="weights")
    assert [f.format for f in export(run, tmp_path / "q", weak).certificate.files] == ["Q8_0"]
    with pytest.raises(Float16RangeError, match="beyond float16's range"):
        export(run, tmp_path / "f", weak._replace(quants="f16,q8_0"))
    assert not (tmp_path / "f").exists()


def test_progress_grows_to_the_whole_of_every_file(
    run: Path, options: ExportOptions, tmp_path: Path
) -> None:
    shares: list[float] = []
    options = options._replace(quants="bf16,q8_0", certificate="none")
    export(run, tmp_path / "out", options, progress=shares.append)
    assert shares.count(1.0) == 3  # the quantizer's source, Q8_0, BF16
    starts = [i + 1 for i, share in enumerate(shares) if share == 1.0]
    for start, stop in zip([0, *starts], starts, strict=False):
        assert shares[start:stop] == sorted(shares[start:stop])


def test_shards_are_read_as_one_base(run: Path, options: ExportOptions, tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", "llama", tied=False)
    whole = export(make_run(tmp_path / "run", base, load_in_8bit=False), tmp_path / "a", options)
    model = transformers.AutoModelForCausalLM.from_pretrained(base)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="100KB")
    assert len(list(base.glob("*.safetensors"))) > 2
    shards = export(make_run(tmp_path / "again", base, load_in_8bit=False), tmp_path / "b", options)
    for one, other in zip(whole.certificate.files, shards.certificate.files, strict=True):
        assert one.difference == other.difference

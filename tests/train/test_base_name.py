"""Names of base models that do not carry this machine's folders."""

import json
from pathlib import Path

import pytest
from support.tiny_fit import QUIET, fit_config

from so8t_train.base_model import resolve_base
from so8t_train.base_name import portable_name
from so8t_train.fit import fit
from so8t_train.run_dir import load_run

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.mark.parametrize(
    "name", ["embedded:smollm2-135m-instruct", "owner/name", "models/tiny", "~/tiny", "../tiny"]
)
def test_symbolic_and_relative_names_stay(name: str) -> None:
    assert portable_name(name) == name


@pytest.mark.parametrize(
    ("below", "name"), [("tiny", "tiny"), ("models/tiny", "./models/tiny"), ("a/b/c", "a/b/c")]
)
def test_below_the_working_directory_it_is_relative(
    below: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert portable_name(str(tmp_path / below)) == name


def test_below_home_it_does_not_say_whose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    base = tmp_path / "models" / "tiny"
    assert portable_name(str(base)) == "~/models/tiny"
    assert Path(portable_name(str(base))).expanduser() == base


def test_elsewhere_the_path_stays(tmp_path: Path) -> None:
    assert portable_name(str(tmp_path / "tiny")) == str(tmp_path / "tiny")


def test_current_snapshot_of_the_hub_cache_is_the_hub_id(tmp_path: Path) -> None:
    repository = tmp_path / "hub" / "models--owner--a-name"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0123abc", encoding="utf-8")
    assert portable_name(str(repository / "snapshots" / "0123abc")) == "owner/a-name"
    other = str(repository / "snapshots" / "fedc987")
    assert portable_name(other) == other


def test_no_file_of_a_run_has_the_absolute_path(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tiny_llama.parent)
    config = fit_config(tmp_path, tiny_llama, max_steps=1)
    assert Path(config.base_model).is_absolute()
    fit(config, resume=False, reporter=QUIET)
    texts = [path for path in config.output_dir.iterdir() if path.suffix != ".safetensors"]
    for path in (p for p in texts if p.is_file()):
        assert str(tiny_llama) not in path.read_text(encoding="utf-8"), path
    assert json.loads((config.output_dir / "so8t.json").read_text())["base_model"] == "llama"
    loaded = load_run(config.output_dir)
    assert loaded.source.sha256 == resolve_base(str(tiny_llama)).sha256

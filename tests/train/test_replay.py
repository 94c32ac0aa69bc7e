"""Replay draws cases of an earlier corpus beside the new ones."""

import json
from collections import Counter
from pathlib import Path

import pytest
from support.case_files import case_dict, write_cases
from support.tiny_fit import QUIET, fit_config, training_cases
from yaml import safe_dump

from so8t_eval.cases import load_cases
from so8t_eval.errors import CaseFileError, ConfigError
from so8t_eval.labels import Verdict
from so8t_train.config import FitConfig, load_config
from so8t_train.fit import FitReporter, fit
from so8t_train.replay import REPLAYED, load_fit_cases, shipped_corpus
from so8t_train.run_dir import read_manifest

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")


@pytest.fixture
def old(tmp_path: Path) -> Path:
    """30 cases of an earlier corpus, ten of each verdict."""
    return write_cases(tmp_path / "old.jsonl", training_cases(30, first=200))


def drawn(config: FitConfig) -> list[str]:
    cases, n_replayed = load_fit_cases(config)
    ids = [case.id for case in cases]
    assert [i.startswith(REPLAYED) for i in ids] == [False] * 12 + [True] * n_replayed
    return ids[12:]


def test_without_a_replay_file_there_are_the_own_cases_alone(tmp_path: Path) -> None:
    assert drawn(fit_config(tmp_path, "base")) == []


def test_default_is_as_many_as_there_are_training_cases(tmp_path: Path, old: Path) -> None:
    assert len(drawn(fit_config(tmp_path, "base", replay_file=old))) == 12


def test_draw_keeps_shares_of_verdicts_and_follows_the_seed(tmp_path: Path, old: Path) -> None:
    def of_seed(seed: int) -> list[str]:
        return drawn(fit_config(tmp_path, "base", replay_file=old, replay_cases=9, seed=seed))

    verdict_of = {f"{REPLAYED}{case.id}": case.verdict for case in load_cases(old)}
    assert Counter(verdict_of[i] for i in of_seed(1)) == dict.fromkeys(Verdict, 3)
    assert of_seed(1) == of_seed(1)
    assert of_seed(1) != of_seed(2)


def test_own_cases_are_not_drawn_a_second_time_whatever_their_label(tmp_path: Path) -> None:
    own = training_cases(12)
    relabelled = [{**case, "id": f"old-{i}", "verdict": "refuse"} for i, case in enumerate(own)]
    old = write_cases(tmp_path / "old.jsonl", [*relabelled, case_dict(500)])
    config = fit_config(tmp_path, "base", replay_file=old, replay_cases=100)
    assert drawn(config) == [f"{REPLAYED}{case_dict(500)['id']}"]


def test_equal_ids_of_different_cases_stay_apart(tmp_path: Path) -> None:
    other = [{**case, "prompt": f"{case['prompt']} please"} for case in training_cases(12)]
    old = write_cases(tmp_path / "old.jsonl", other)
    assert len(drawn(fit_config(tmp_path, "base", replay_file=old))) == 12


def test_shipped_names_the_package_s_corpus(tmp_path: Path) -> None:
    config = fit_config(tmp_path, "base")
    file = tmp_path / "fit.yaml"
    values = {**config.model_dump(mode="json"), "replay_file": "shipped", "replay_cases": 30}
    file.write_text(safe_dump(values), encoding="utf-8")
    ids = drawn(load_config(file))
    assert len(ids) == 30
    assert {i.removeprefix(REPLAYED) for i in ids} <= {c.id for c in load_cases(shipped_corpus())}


def test_replay_files_are_relative_to_the_configuration(tmp_path: Path, old: Path) -> None:
    file = tmp_path / "sub" / "fit.yaml"
    file.parent.mkdir()
    values = fit_config(tmp_path, "base").model_dump(mode="json") | {"replay_file": "../old.jsonl"}
    file.write_text(safe_dump(values), encoding="utf-8")
    assert load_config(file).replay_file[0].resolve() == old.resolve()


def test_missing_replay_file_is_named(tmp_path: Path) -> None:
    config = fit_config(tmp_path, "base", replay_file=tmp_path / "gone.jsonl")
    with pytest.raises(CaseFileError, match=r"gone\.jsonl"):
        load_fit_cases(config)


def test_number_without_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="replay_cases: expected a replay_file to draw from"):
        fit_config(tmp_path, "base", replay_cases=5)


def test_fit_learns_from_both_and_says_so(tmp_path: Path, tiny_llama: Path, old: Path) -> None:
    news: list[str] = []
    config = fit_config(tmp_path, tiny_llama, replay_file=old, replay_cases=6, max_steps=1)
    fit(config, resume=False, reporter=FitReporter(news.append, QUIET.on_step))
    assert "replaying 6 cases beside 12 of train_file" in news
    training = read_manifest(config.output_dir).training
    assert (training["cases"], training["replayed"]) == (18, 6)
    card = (config.output_dir / "README.md").read_text(encoding="utf-8")
    assert "Trained on 18 cases, 6 of them drawn from `old.jsonl`." in card
    saved = json.loads((config.output_dir / "so8t.json").read_text(encoding="utf-8"))
    assert saved["config"]["replay_file"] == ["old.jsonl"]


def test_a_replay_of_nothing_but_own_cases_is_an_error(tmp_path: Path) -> None:
    config = fit_config(tmp_path, "base")
    same = config.model_copy(update={"replay_file": config.train_file})
    with pytest.raises(ConfigError, match="replay_file: expected cases that are not in train_file"):
        load_fit_cases(same)

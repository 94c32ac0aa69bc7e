"""Splits: every case once, nothing alike on both sides, shares kept, files whole or not at all."""

import json
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.case_files import case_dict, write_cases
from support.related_cases import related_cases, single_cases

from so8t_eval.cases import Case, load_cases
from so8t_eval.errors import CaseFileError, So8tError, UsageError
from so8t_eval.linting import ACROSS_FILES
from so8t_eval.near_duplicates import character_ngrams
from so8t_train.case_groups import group_cases
from so8t_train.data_split import Split, check_apart, split_cases, split_file


def similarity(a: Case, b: Case) -> float:
    left, right = character_ngrams(a.text), character_ngrams(b.text)
    return len(left & right) / len(left | right)


def source(directory: Path, n: int = 30) -> Path:
    path = directory / "all.jsonl"
    lines = [case.model_dump_json(exclude_none=True) + "\n" for case in single_cases(n)]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@settings(deadline=None, max_examples=25)
@given(related_cases(), st.sampled_from([0.1, 0.3, 0.5]), st.integers(0, 2**32 - 1))
def test_every_case_once_and_nothing_alike_across(
    cases: list[Case], share: float, seed: int
) -> None:
    split = split_cases(cases, share, seed)
    assert sorted(split.train + split.dev) == list(range(len(cases)))
    assert list(split.dev) == sorted(split.dev)
    train, dev = ([cases[i] for i in side] for side in (split.train, split.dev))
    assert max(similarity(a, b) for a in train for b in dev) < ACROSS_FILES
    for one, other in ((train, dev), (dev, train)):
        notes = {case.note for case in one}
        assert not [case.id for case in other if f"twin of {case.id}" in notes]
    check_apart(cases, split)


@pytest.mark.parametrize("seed", range(3))
def test_the_shares_of_verdicts_and_languages_are_kept(seed: int) -> None:
    cases = single_cases(60)
    split = split_cases(cases, 0.2, seed)
    counts = Counter((cases[i].verdict, cases[i].lang) for i in split.dev)
    assert len(counts) == 6
    assert set(counts.values()) == {2}


def test_a_parted_pair_and_a_lost_case_are_found() -> None:
    cases = [*single_cases(4), single_cases(1)[0].model_copy(update={"id": "copy"})]
    groups = group_cases(cases, near_duplicates_too=True)
    with pytest.raises(So8tError, match="parted 'single-0' and 'copy'"):
        check_apart(cases, Split((0, 1, 2), (3, 4), groups))
    with pytest.raises(So8tError, match="lost or repeated"):
        check_apart(cases, Split((0, 1, 2), (4,), groups))


def test_lines_are_copied_as_they_are(tmp_path: Path) -> None:
    cases = [json.dumps(case_dict(i, prompt=c.text)) for i, c in enumerate(single_cases(9))]
    spaced = cases[4].replace(": ", " :  ")
    path = tmp_path / "all.jsonl"
    text = "\ufeff" + "\r\n".join([*cases[:4], "", spaced, *cases[5:]])
    path.write_bytes(text.encode())
    result = split_file(path, tmp_path / "new" / "dir", dev_share=0.3, seed=0)
    written = [
        file.read_text(encoding="utf-8").splitlines()
        for file in (result.train_file, result.dev_file)
    ]
    assert sorted(written[0] + written[1]) == sorted([*cases[:4], spaced, *cases[5:]])
    assert [len(lines) for lines in written] == [result.n_train, result.n_dev] == [6, 3]
    assert b"\r" not in result.train_file.read_bytes()


def test_the_seed_decides(tmp_path: Path) -> None:
    path = source(tmp_path)
    texts = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        split_file(path, tmp_path / name, dev_share=0.3, seed=seed)
        texts.append((tmp_path / name / "dev.jsonl").read_text(encoding="utf-8"))
    assert texts[0] == texts[1] != texts[2]


def test_old_files_stay_unless_forced(tmp_path: Path) -> None:
    path, out = source(tmp_path), tmp_path / "out"
    out.mkdir()
    (out / "dev.jsonl").write_text("mine\n", encoding="utf-8")
    with pytest.raises(UsageError, match=r"dev\.jsonl exists; add --force"):
        split_file(path, out, dev_share=0.3, seed=0)
    assert [file.name for file in out.iterdir()] == ["dev.jsonl"]
    split_file(path, out, dev_share=0.3, seed=0, force=True)
    assert sorted(file.name for file in out.iterdir()) == ["dev.jsonl", "train.jsonl"]
    assert len(load_cases(out / "dev.jsonl")) == 9


def test_the_source_is_never_overwritten(tmp_path: Path) -> None:
    path = source(tmp_path).rename(tmp_path / "train.jsonl")
    before = path.read_bytes()
    with pytest.raises(UsageError, match="is the file to read from"):
        split_file(path, tmp_path, dev_share=0.3, seed=0, force=True)
    assert path.read_bytes() == before


def test_cases_that_are_all_alike_cannot_be_split(tmp_path: Path) -> None:
    text = "the same long system text in front of every request there is"
    alike = [case_dict(i, prompt=f"{text} {i}") for i in range(6)]
    path = write_cases(tmp_path / "a.jsonl", alike)
    with pytest.raises(UsageError, match=r"6 cases in 1 groups .* from messages to policy"):
        split_file(path, tmp_path / "out", dev_share=0.3, seed=0)
    assert not (tmp_path / "out").exists()


def test_a_broken_line_is_named_and_nothing_written(tmp_path: Path) -> None:
    path = write_cases(tmp_path / "a.jsonl", [case_dict(0), case_dict(1, verdict="deny")])
    with pytest.raises(CaseFileError, match=r"a\.jsonl:2: verdict"):
        split_file(path, tmp_path / "out", dev_share=0.3, seed=0)
    assert not (tmp_path / "out").exists()


def test_a_class_too_small_for_both_sides_is_told(tmp_path: Path) -> None:
    singles = [case.model_dump(mode="json", exclude_none=True) for case in single_cases(30)]
    cases = [case for case in singles if case["verdict"] != "refuse"] + [singles[2]]
    lone = {"tags": ["twin"], "note": "twin of nobody"}
    cases[0] = {**cases[0], **lone}
    path = write_cases(tmp_path / "a.jsonl", cases)
    result = split_file(path, tmp_path / "out", dev_share=0.2, seed=0)
    assert result.warnings[0] == "no dev case with verdict refuse"
    assert "1 case tagged twin without a partner in this file" in result.warnings[1]

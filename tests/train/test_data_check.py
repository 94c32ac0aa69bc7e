"""Findings and figures of case files, as training would meet them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from support.case_files import write_cases
from support.related_cases import single_cases
from support.tiny_hf import EOS

from so8t_eval.cases import load_cases
from so8t_eval.errors import CaseFileError, UsageError
from so8t_eval.linting import Finding
from so8t_train.base_vocabulary import BaseVocabulary, open_vocabulary
from so8t_train.config import parse_config
from so8t_train.data_check import DataCheck, check_files
from so8t_train.training_data import class_weights, tokenize_cases
from so8t_train.training_figures import TOKEN_QUANTILES

MAX_LENGTH = 128


@pytest.fixture(scope="module")
def vocabulary(tiny_llama: Path) -> BaseVocabulary:
    return open_vocabulary(str(tiny_llama))


def clean(n: int = 9, first: int = 0, **changes: object) -> list[dict[str, object]]:
    cases = [case.model_dump(mode="json", exclude_none=True) for case in single_cases(first + n)]
    return [{**case, "tags": [], **changes} for case in cases[first:]]


def check(
    vocabulary: BaseVocabulary, files: Sequence[Path], against: Sequence[Path] = ()
) -> DataCheck:
    return check_files(files, against, vocabulary, MAX_LENGTH)


def rules(findings: Sequence[Finding]) -> list[tuple[str, str, str | None]]:
    return [(finding.severity, finding.rule, finding.id) for finding in findings]


def test_clean_files_have_no_findings(vocabulary: BaseVocabulary, tmp_path: Path) -> None:
    files = [
        write_cases(tmp_path / "a.jsonl", clean(9)),
        write_cases(tmp_path / "b.jsonl", clean(9, 9)),
    ]
    result = check(vocabulary, files)
    assert result.findings == []
    assert [figures.n for figures in result.files] == [9, 9]
    assert result.n_errors == 0


def test_figures_are_those_of_training(vocabulary: BaseVocabulary, tmp_path: Path) -> None:
    cases = clean(12)
    cases[0]["reply"] = "Sure, here it is."
    cases[3]["reply"] = ""
    cases[1]["prompt"] = "long " * 200
    path = write_cases(tmp_path / "a.jsonl", cases)
    (figures,) = check(vocabulary, [path]).files
    loaded = load_cases(path)
    config = parse_config({"base_model": "b", "train_file": "t", "output_dir": "o"}, "test")
    every = tokenize_cases(
        loaded, vocabulary.tokenizer, vocabulary.verdict_ids, class_weights(loaded, config), 10**6
    ).examples
    english = [e for e, case in zip(every, loaded, strict=True) if case.lang == "en"]
    expected = np.quantile([e.prompt.length for e in english], TOKEN_QUANTILES, method="nearest")
    assert figures.tokens["en"].prompt == tuple(expected)
    assert figures.tokens["en"].n == len(english)
    longest = [max(e.prompt.length, e.reply.length if e.reply else 0) for e in english]
    assert figures.tokens["en"].longest_pass[-1] == max(longest)
    assert figures.too_long == ("single-1",)
    assert sum(figures.cases.values()) == 12
    assert {name: n for name, n in figures.with_reply.items() if n} == {"allow/en": 1}


@pytest.mark.parametrize(
    ("changes", "finding"),
    [
        ({"prompt": "long " * 200}, ("warning", "too-long", "single-1")),
        ({"reply": "long " * 200}, ("warning", "long-reply", "single-1")),
        ({"prompt": f"hello {EOS} there"}, ("warning", "control-text", "single-1")),
        ({"policy": "<|so8t_allow|> is good"}, ("warning", "control-text", "single-1")),
        ({"reply": f"Sure.{EOS}"}, ("warning", "control-text", "single-1")),
        ({"reply": "<|so8t_allow|>Sure."}, ("warning", "reply", "single-1")),
        ({"tags": ["twin"], "note": "twin of x"}, ("warning", "lone-twin", "single-1")),
        ({"prompt": single_cases(1)[0].text}, ("error", "duplicate", "single-1")),
        ({"prompt": single_cases(1)[0].text + "z"}, ("warning", "near-duplicate", "single-1")),
        ({"verdict": "deny"}, ("error", "schema", None)),
    ],
)
def test_every_kind_of_finding(
    vocabulary: BaseVocabulary,
    tmp_path: Path,
    changes: dict[str, object],
    finding: tuple[str, str, str | None],
) -> None:
    cases = clean(9, reply="Sure.") if finding[1] == "reply" else clean(9)
    cases[1] |= changes
    found = check(vocabulary, [write_cases(tmp_path / "a.jsonl", cases)]).findings
    assert [f for f in rules(found) if f[1] != "reply" or finding[1] == "reply"] == [finding]
    assert found[0].line == 2
    assert found[0].path == str(tmp_path / "a.jsonl")


def test_a_verdict_without_a_case_that_fits_is_an_error(
    vocabulary: BaseVocabulary, tmp_path: Path
) -> None:
    without = [case for case in clean(9) if case["verdict"] != "refuse"]
    first = write_cases(tmp_path / "a.jsonl", without)
    assert rules(check(vocabulary, [first]).findings) == [("error", "missing-verdict", None)]
    rest = [
        {**case, "id": f"{case['id']}-b"} for case in clean(9, 9) if case["verdict"] == "refuse"
    ]
    second = write_cases(tmp_path / "b.jsonl", rest)
    assert check(vocabulary, [first, second]).findings == []
    long = [{**case, "prompt": f"{case['prompt']} {'long ' * 200}"} for case in rest[:1]]
    too_long = write_cases(tmp_path / "c.jsonl", long)
    found = rules(check(vocabulary, [first, too_long]).findings)
    assert ("error", "missing-verdict", None) in found
    replies = write_cases(tmp_path / "d.jsonl", [{**rest[0], "reply": "long " * 200}])
    found = rules(check(vocabulary, [first, replies]).findings)
    assert ("error", "missing-verdict", None) not in found  # its verdict is learned


def test_repeats_across_files_and_against_references_are_errors(
    vocabulary: BaseVocabulary, tmp_path: Path
) -> None:
    train = write_cases(tmp_path / "a.jsonl", clean(9))
    dev = write_cases(tmp_path / "dev.jsonl", clean(9)[4:5])
    found = check(vocabulary, [train], [dev]).findings
    assert rules(found) == [("error", "near-duplicate", "single-4")]
    assert f"1.00 similar to {dev}:1" in found[0].message
    together = rules(check(vocabulary, [train, dev]).findings)
    assert ("error", "repeated-id", "single-4") in together
    assert ("error", "near-duplicate", "single-4") in together


def test_a_conversation_the_template_rejects_is_named(tmp_path: Path, tiny_llama: Path) -> None:
    vocabulary = open_vocabulary(str(tiny_llama))
    vocabulary.tokenizer.protocol.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ raise_exception('no') }}"
        "{% endif %}{{ m['content'] }}|{% endfor %}"
    )
    cases = clean(9)
    turns = [("user", "hello"), ("assistant", "yes"), ("user", "and now")]
    cases[2]["messages"] = [{"role": role, "content": text} for role, text in turns]
    del cases[2]["prompt"]
    found = check(vocabulary, [write_cases(tmp_path / "a.jsonl", cases)]).findings
    assert rules(found) == [("error", "template", "single-2")]


def test_wrong_arguments(vocabulary: BaseVocabulary, tmp_path: Path) -> None:
    path = write_cases(tmp_path / "a.jsonl", clean(9))
    with pytest.raises(UsageError, match="given twice"):
        check(vocabulary, [path], [path])
    with pytest.raises(CaseFileError, match="cannot be read"):
        check(vocabulary, [path], [tmp_path / "none.jsonl"])
    assert rules(check(vocabulary, [tmp_path / "none.jsonl"]).findings) == [
        ("error", "schema", None)
    ]

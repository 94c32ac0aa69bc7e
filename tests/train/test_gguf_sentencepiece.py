"""SentencePiece-style vocabularies: llama.cpp's ids on any Unicode, or a refusal that says why."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import llama_cpp
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support.tiny_hf import EOS, SPECIAL_TOKENS, VOCABULARY, Family, make_tiny_model
from support.vocabulary_gguf import write_base_vocabulary
from tokenizers import AddedToken, Tokenizer

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.errors import ExportError
from so8t_train.base_model import load_tokenizer, resolve_base
from so8t_train.base_vocabulary import open_vocabulary
from so8t_train.base_weights import read_base_weights
from so8t_train.gguf_export import check_gguf_base
from so8t_train.gguf_sentencepiece import SPACE, model_name, overlapping_splits, sentencepiece_rows
from so8t_train.gguf_vocabulary import vocabulary_of

FAMILIES: tuple[Family, ...] = ("mistral", "phi3", "gemma3_text", "smollm3")
WORDS = (
    *SPECIAL_TOKENS,
    "<unk>",
    "</s>",
    "<table>",
    "<0x0A>",
    "<|so8t_allow|>",
    SPACE,
    SPACE * 3,
    "     ",
    "-------",
    "aaaaa",
    "=====",
    "\n\n\n",
    "\r\n",
    " the meeting",
    "会議の日程",
    "e\u0301",
)
texts = st.lists(st.one_of(st.text(max_size=12), st.sampled_from(WORDS)), max_size=8).map("".join)
property_test = settings(
    max_examples=250, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Both(NamedTuple):
    """The same vocabulary in both runtimes."""

    ours: HfTokenizer
    native: llama_cpp.Llama

    def native_ids(self, text: str, parse_special: bool) -> list[int]:
        ids: list[int] = self.native.tokenize(text.encode(), add_bos=False, special=parse_special)
        return ids


@pytest.fixture(scope="module", params=FAMILIES)
def both(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Both]:
    directory = tmp_path_factory.mktemp("sentencepiece")
    base = make_tiny_model(directory / "base", request.param, spare_rows=3)
    path = write_base_vocabulary(directory / "vocabulary.gguf", base)
    native = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    yield Both(load_tokenizer(resolve_base(str(base))), native)
    native.close()


@property_test
@given(text=texts)
@example(text="")
@example(text=" ")
@example(text="a\x00b \u00a0\u3000\u2028x\ufeff🇯🇵👩‍👩‍👧 한국어")
@example(text="</s> \n<|im_end|>  <table>  x")
def test_plain_text_has_llama_cpp_ids(both: Both, text: str) -> None:
    assert both.ours.tokenize(text, False) == both.native_ids(text, False)


@property_test
@given(text=st.lists(st.sampled_from([*WORDS, "user", "\n", " ", "x"]), max_size=8).map("".join))
def test_template_text_has_llama_cpp_ids(both: Both, text: str) -> None:
    # White space of other kinds is in no template: Phi 3's tokens drop it in one runtime only.
    if "<|so8t" not in text:
        assert both.ours.tokenize(text, True) == both.native_ids(text, True)


@property_test
@given(text=texts)
def test_plain_text_never_gives_a_control_token(both: Both, text: str) -> None:
    assert not set(both.ours.tokenize(text, False)) & set(range(len(SPECIAL_TOKENS)))


def test_pieces_stand_for_their_bytes(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", "mistral")
    vocabulary = open_vocabulary(str(base))
    text = "Please delete 会議 \U0001f600"
    ids = vocabulary.tokenizer.tokenize(text, False)
    assert b"".join(vocabulary.piece(i).raw for i in ids).decode() == f" {text}"
    assert vocabulary.piece(SPECIAL_TOKENS.index(EOS)).is_special


def _spec(tmp_path: Path, family: Family = "mistral") -> dict[str, Any]:
    base = make_tiny_model(tmp_path / "base", family)
    spec: dict[str, Any] = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    return spec


def _drop_a_merge(spec: dict[str, Any]) -> None:
    by_token: dict[str, int] = {}
    for i, (left, right) in enumerate(spec["model"]["merges"]):
        if left + right in by_token:
            del spec["model"]["merges"][i]
            return
        by_token[left + right] = i


def _metaspace_first(spec: dict[str, Any]) -> None:
    spec["normalizer"] = None
    spec["pre_tokenizer"] = {
        "type": "Metaspace",
        "replacement": SPACE,
        "prepend_scheme": "first",
        "split": False,
    }


def _set(part: str, key: str, value: object) -> Callable[[dict[str, Any]], None]:
    return lambda spec: spec[part].__setitem__(key, value)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_drop_a_merge, "no merge of"),
        (_metaspace_first, "text prepared as.*first"),
        (lambda spec: spec.update(normalizer={"type": "NFKC"}), "text prepared as.*NFKC"),
        (_set("model", "ignore_merges", True), "ignore_merges"),
        (lambda spec: spec["model"]["vocab"].pop("<0x41>"), "byte fallback without.*0x41"),
        (lambda spec: spec["model"]["merges"].reverse() or _swap(spec), "whose ranks lie apart"),
        (lambda spec: spec["added_tokens"][0].update(lstrip=True), "endoftext.*lstrip"),
        (lambda spec: spec["added_tokens"][0].update(rstrip=True), "rstrip on some"),
    ],
)
def test_what_llama_cpp_would_split_otherwise_is_refused(
    change: Callable[[dict[str, Any]], object], reason: str, tmp_path: Path
) -> None:
    spec = _spec(tmp_path)
    sentencepiece_rows(spec, tmp_path)
    change(spec)
    with pytest.raises(ExportError, match=f"follows exactly, found.*{reason}.*--format hf"):
        sentencepiece_rows(spec, tmp_path)


def _swap(spec: dict[str, Any]) -> None:
    """Put one of two ways to a token to the end."""
    merges = spec["model"]["merges"]
    tokens = ["".join(merge) for merge in merges]
    at = next(i for i, token in enumerate(tokens) if tokens.count(token) > 1)
    merges.append(merges.pop(at))


def test_runs_of_one_letter_are_the_ways_that_overlap(tmp_path: Path) -> None:
    found = set(overlapping_splits(_spec(tmp_path)))
    assert found
    assert all(len(set(text)) == 1 for text in found)


def test_a_control_token_by_name_alone_is_told_of_with_the_remedy(tmp_path: Path) -> None:
    base = make_tiny_model(tmp_path / "base", "mistral", spare_rows=3)
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("</s>", normalized=False)])
    tokenizer.save(str(base / "tokenizer.json"))
    source = resolve_base(str(base))
    with pytest.raises(ExportError, match=r"'</s>'.*set its special to true"):
        check_gguf_base(read_base_weights(source), load_tokenizer(source))


def test_a_unigram_tokenizer_is_refused(tmp_path: Path) -> None:
    from tokenizers import models

    tokenizer = Tokenizer(models.Unigram([("a", 0.0)]))
    with pytest.raises(ExportError, match=r"expected a BPE tokenizer.*found Unigram"):
        vocabulary_of(tokenizer, VOCABULARY, tmp_path)


@pytest.mark.parametrize(
    ("name", "strips", "expected"),
    [
        ("my-base", True, "phi-3 my-base"),
        ("Phi-3.5-mini", True, "Phi-3.5-mini"),
        ("Phi-3.5-mini", False, "phi_3.5-mini"),
        ("my-base", False, "my-base"),
    ],
)
def test_the_name_decides_what_llama_cpp_strips(name: str, strips: bool, expected: str) -> None:
    assert model_name(name, strips_after_tokens=strips) == expected

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from so8t_eval.near_duplicates import character_ngrams, near_duplicates, normalised


def brute_force(texts, threshold):
    grams = [character_ngrams(text) for text in texts]
    found = {}
    for j in range(len(texts)):
        for i in range(j):
            union = grams[i] | grams[j]
            if union and len(grams[i] & grams[j]) / len(union) >= threshold - 1e-9:
                found[i, j] = len(grams[i] & grams[j]) / len(union)
    return found


def found_pairs(texts, threshold):
    return {(a, b): similarity for a, b, similarity in near_duplicates(texts, threshold)}


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.text(alphabet="ab あ", max_size=30), max_size=14),
    st.sampled_from([0.05, 0.3, 0.5, 0.6, 0.9, 1.0]),
)
def test_equals_the_comparison_of_all_pairs(texts, threshold):
    assert found_pairs(texts, threshold) == pytest.approx(brute_force(texts, threshold))


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_edited_copies_are_found_like_by_all_pairs(data):
    words = data.draw(st.lists(st.text("abcdefgh", min_size=3, max_size=8), min_size=6, max_size=9))
    texts = [" ".join(words)]
    for _ in range(5):
        edited = list(words)
        edited[data.draw(st.integers(0, len(words) - 1))] = data.draw(st.text("xyz", max_size=9))
        texts.append(" ".join(edited))
    assert found_pairs(texts, 0.5) == pytest.approx(brute_force(texts, 0.5))


def test_more_texts_than_a_block_are_compared_across_blocks():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefghijklmnop"), 40)) for _ in range(600)]
    texts[590] = texts[3] + "!"
    texts[300] = texts[299].upper()
    assert set(found_pairs(texts, 0.6)) == {(3, 590), (299, 300)}


def test_case_width_and_spacing_do_not_count():
    assert normalised("  Ｄelete\tTHE  files\n") == "delete the files"
    assert found_pairs(["Delete the files", "  ｄｅｌｅｔｅ THE\nfiles "], 1.0) == {(0, 1): 1.0}


def test_short_and_empty_texts():
    assert character_ngrams("abc") == {"abc"}
    assert character_ngrams("abcdef") == {"abcde", "bcdef"}
    assert found_pairs(["abc", "abc", "", " ", "abd"], 0.5) == {(0, 1): 1.0}
    assert found_pairs([], 0.5) == {}


@pytest.mark.parametrize("threshold", [0, -1, 1.1])
def test_threshold_must_be_a_share(threshold):
    with pytest.raises(ValueError, match="within"):
        list(near_duplicates(["a"], threshold))


def test_4000_texts_take_a_few_seconds():
    rng = np.random.default_rng(1)
    vocabulary = np.array(["".join(rng.choice(list("etaoinshrdlu"), 5)) for _ in range(3000)])
    texts = [" ".join(rng.choice(vocabulary, 18)) for _ in range(4000)]
    texts[3999] = texts[7]
    started = time.process_time()
    assert set(found_pairs(texts, 0.5)) == {(7, 3999)}
    assert time.process_time() - started < 10

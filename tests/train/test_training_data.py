"""From labelled cases to token sequences, weights and the order of steps."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.case_files import case_dict, write_cases
from support.tiny_fit import QUIET, fit_config, training_cases
from support.tiny_hf import EOS, VOCABULARY

from so8t_eval.backends.hf_tokenizer import HfTokenizer, load_hf_tokenizer
from so8t_eval.cases import Case
from so8t_eval.errors import CaseFileError, ConfigError
from so8t_eval.labels import SEVERITY_ORDER, Verdict
from so8t_train.config import FitConfig, parse_config
from so8t_train.fit import FitReporter, fit
from so8t_train.training_data import (
    class_weights,
    load_training_cases,
    step_order,
    tokenize_cases,
    weighted,
)

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

VERDICT_IDS = (VOCABULARY, VOCABULARY + 1, VOCABULARY + 2)
WEIGHTS = {Verdict.ALLOW: 0.5, Verdict.ESCALATE: 2.0, Verdict.REFUSE: 1.0}


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> HfTokenizer:
    return load_hf_tokenizer(tiny_llama)


def case(number: int = 0, **changes: object) -> Case:
    return Case.model_validate(case_dict(number, **changes))


def config(**changes: object) -> FitConfig:
    base = {"base_model": "b", "train_file": "t", "output_dir": "o"}
    return parse_config({**base, **changes}, "test")


def with_counts(allow: int, escalate: int, refuse: int) -> list[Case]:
    cases = []
    for verdict, n in zip(SEVERITY_ORDER, (allow, escalate, refuse), strict=True):
        cases += [case(len(cases) + i, verdict=verdict.value) for i in range(n)]
    return cases


def test_several_files_are_read_as_one_in_order(tmp_path: Path) -> None:
    first = write_cases(tmp_path / "a.jsonl", training_cases(3))
    second = write_cases(tmp_path / "b.jsonl", training_cases(2, first=3))
    assert [c.id for c in load_training_cases([first, second])] == [
        f"case-{i:04d}" for i in range(5)
    ]


def test_an_id_used_in_two_files_names_both(tmp_path: Path) -> None:
    first = write_cases(tmp_path / "a.jsonl", training_cases(3))
    second = write_cases(tmp_path / "b.jsonl", training_cases(1, first=2))
    with pytest.raises(CaseFileError) as caught:
        load_training_cases([first, second])
    text = str(caught.value)
    assert text.startswith(f"{second}: id: 'case-0002'")
    assert str(first) in text


@pytest.mark.parametrize("absent", SEVERITY_ORDER)
@pytest.mark.parametrize("setting", ["balanced", "none", [1.0, 2.0, 3.0]])
def test_a_verdict_without_a_case_is_an_error(absent: Verdict, setting: object) -> None:
    cases = [c for c in with_counts(1, 1, 1) if c.verdict is not absent]
    with pytest.raises(ConfigError, match=f"no case with verdict {absent.value}; .*add some"):
        class_weights(cases, config(class_weights=setting))


@given(counts=st.tuples(*[st.integers(1, 40)] * 3))
def test_balanced_weights_give_every_class_the_same_total_and_mean_one(
    counts: tuple[int, int, int],
) -> None:
    weights = class_weights(with_counts(*counts), config())
    totals = [weights[v] * n for v, n in zip(SEVERITY_ORDER, counts, strict=True)]
    assert totals == pytest.approx([sum(counts) / 3] * 3)
    assert sum(totals) / sum(counts) == pytest.approx(1)


def test_weights_as_configured_go_by_severity() -> None:
    cases = with_counts(5, 1, 1)
    assert class_weights(cases, config(class_weights=[1, 2, 3])) == {
        Verdict.ALLOW: 1.0,
        Verdict.ESCALATE: 2.0,
        Verdict.REFUSE: 3.0,
    }
    assert set(class_weights(cases, config(class_weights="none")).values()) == {1.0}


def test_prompt_ends_at_the_verdict_position(tokenizer: HfTokenizer) -> None:
    item = case(2, policy="Be careful.")
    (example,) = tokenize_cases([item], tokenizer, VERDICT_IDS, WEIGHTS, 512).examples
    ids = tokenizer.protocol.prompt_ids(item.conversation, item.policy, tokenizer.tokenize)
    assert list(example.prompt.head + example.prompt.own) == ids.ids
    assert example.prompt.head == ids.head
    assert example.prompt.first_supervised == len(example.prompt.own) - 1
    assert example.prompt.targets == (VERDICT_IDS[2],)
    assert example.prompt.weight == WEIGHTS[Verdict.REFUSE]
    assert example.reply is None


def test_reply_follows_the_verdict_and_ends_the_turn(tokenizer: HfTokenizer) -> None:
    item = case(0, reply="Sure, here it is.")
    (example,) = tokenize_cases([item], tokenizer, VERDICT_IDS, WEIGHTS, 512).examples
    assert example.reply is not None
    answer = tokenizer.tokenize("Sure, here it is.", False)
    (end,) = tokenizer.tokenize(EOS, True)
    n = len(example.prompt.own)
    assert example.reply.own == (*example.prompt.own, VERDICT_IDS[0], *answer)
    assert example.reply.targets == (*answer, end)
    assert example.reply.own[example.reply.first_supervised] == VERDICT_IDS[0]
    assert example.reply.first_supervised == n
    assert example.reply.weight == 1.0


def test_reply_with_template_markup_is_plain_text(tokenizer: HfTokenizer) -> None:
    item = case(0, reply=f"{EOS} <|so8t_refuse|>")
    (example,) = tokenize_cases([item], tokenizer, VERDICT_IDS, WEIGHTS, 512).examples
    assert example.reply is not None
    (end,) = tokenizer.tokenize(EOS, True)
    assert example.reply.targets.count(end) == 1
    assert not set(example.reply.targets) & set(VERDICT_IDS)


def test_cases_longer_than_the_limit_are_left_out_by_id(tokenizer: HfTokenizer) -> None:
    cases = [case(0), case(1, prompt="long " * 200), case(2)]
    data = tokenize_cases(cases, tokenizer, VERDICT_IDS, WEIGHTS, 100)
    assert [e.id for e in data.examples] == ["case-0000", "case-0002"]
    assert data.too_long == ["case-0001"]
    exact = data.examples[0].prompt.length
    at_limit = tokenize_cases(cases[:1], tokenizer, VERDICT_IDS, WEIGHTS, exact)
    assert at_limit.too_long == []
    below = tokenize_cases(cases[:1], tokenizer, VERDICT_IDS, WEIGHTS, exact - 1)
    assert below.too_long == ["case-0000"]


def test_a_reply_that_does_not_fit_leaves_the_verdict(tokenizer: HfTokenizer) -> None:
    cases = [case(0, reply="Sure, " * 200), case(1, reply="Sure.")]
    data = tokenize_cases(cases, tokenizer, VERDICT_IDS, WEIGHTS, 100)
    assert [example.reply is None for example in data.examples] == [True, False]
    assert (data.too_long, data.long_replies) == ([], ["case-0000"])


def test_fit_refuses_a_file_whose_cases_are_all_too_long(tiny_llama: Path, tmp_path: Path) -> None:
    settings = fit_config(tmp_path, tiny_llama, max_length=64)
    write_cases(tmp_path / "dev.jsonl", [case_dict(i, prompt="long " * 99) for i in range(3)])
    news: list[str] = []
    reporter = FitReporter(news.append, lambda _report, _memory: None)
    with pytest.raises(ConfigError, match="dev_file: every case is longer than max_length=64"):
        fit(settings, resume=False, reporter=reporter)


def test_fit_refuses_a_training_file_without_one_class(tiny_llama: Path, tmp_path: Path) -> None:
    settings = fit_config(tmp_path, tiny_llama)
    write_cases(tmp_path / "train.jsonl", [case_dict(i) for i in range(9) if i % 3])
    with pytest.raises(ConfigError, match="no case with verdict allow"):
        fit(settings, resume=False, reporter=QUIET)
    assert not settings.output_dir.exists()


@given(n=st.integers(1, 60), size=st.integers(1, 9), epoch=st.integers(0, 5))
def test_every_example_comes_once_per_epoch(n: int, size: int, epoch: int) -> None:
    steps = step_order(n, size, epoch, seed=3)
    assert sorted(i for step in steps for i in step) == list(range(n))
    assert all(len(step) == size for step in steps[:-1])
    assert 1 <= len(steps[-1]) <= size


def test_order_depends_on_seed_and_epoch_alone() -> None:
    assert step_order(50, 4, 1, seed=2) == step_order(50, 4, 1, seed=2)
    assert step_order(50, 4, 1, seed=2) != step_order(50, 4, 2, seed=2)
    assert step_order(50, 4, 1, seed=2) != step_order(50, 4, 1, seed=3)
    assert step_order(50, 4, 0, seed=2**32 - 1) != step_order(50, 4, 0, seed=0)


def test_class_weights_count_the_cases_that_are_trained_on(tokenizer: HfTokenizer) -> None:
    """One of three allow cases is too long: the other two share the weight of their class."""
    verdicts = ("allow", "allow", "allow", "escalate", "refuse")
    cases = [
        case(i, verdict=verdict, prompt="long " * 200 if i == 2 else f"short {i}")
        for i, verdict in enumerate(verdicts)
    ]
    data = tokenize_cases(cases, tokenizer, VERDICT_IDS, None, 100)
    assert data.too_long == ["case-0002"]
    assert {e.prompt.weight for e in data.examples} == {1.0}
    weighed = weighted(data, config(max_length=100))
    assert [e.prompt.weight for e in weighed.examples] == pytest.approx(
        [2 / 3, 2 / 3, 4 / 3, 4 / 3]
    )
    assert [
        e._replace(prompt=d.prompt) for e, d in zip(weighed.examples, data.examples, strict=True)
    ] == (data.examples)


def test_a_verdict_whose_cases_are_all_too_long_is_an_error(tokenizer: HfTokenizer) -> None:
    cases = [case(0), case(1), case(2, prompt="long " * 200)]
    data = tokenize_cases(cases, tokenizer, VERDICT_IDS, None, 100)
    with pytest.raises(ConfigError, match="no case with verdict refuse fits max_length=100 tokens"):
        weighted(data, config(max_length=100))

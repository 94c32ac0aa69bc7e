"""The losses against a stock model whose embedding matrix really has the three verdict rows."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given
from hypothesis import strategies as st
from support.tiny_fit import build, fit_config, training_cases
from torch import Tensor, nn

from so8t_eval.cases import Case
from so8t_eval.labels import SEVERITY_ORDER, Verdict
from so8t_train.losses import safety_loss, smoothed_cross_entropy, task_loss
from so8t_train.packing import PackedSequence, pack
from so8t_train.pet import temporal_penalty
from so8t_train.safety_model import SafetyModel
from so8t_train.training_data import TrainingExample, tokenize_cases

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

CPU = torch.device("cpu")
WEIGHTS = dict(zip(SEVERITY_ORDER, (0.5, 2.0, 1.25), strict=True))
BASES = ("tiny_llama", "untied_qwen")


class Setup:
    """A live model at its initial weights, its examples, and the stock model it must equal."""

    def __init__(self, base: Path, directory: Path) -> None:
        self.model, tokenizer = build(fit_config(directory, base))
        self.model.eval()
        cases = [Case.model_validate(c) for c in training_cases(9)]
        self.examples: list[TrainingExample] = tokenize_cases(
            cases, tokenizer, self.model.verdict_ids, WEIGHTS, 512
        ).examples
        self.stock = stock_with_rows(base, self.model)

    @property
    def prompts(self) -> list[PackedSequence]:
        return [example.prompt for example in self.examples]

    @property
    def replies(self) -> list[PackedSequence]:
        return [example.reply for example in self.examples if example.reply is not None]


def stock_with_rows(base: Path, model: SafetyModel) -> nn.Module:
    """The base with the verdict rows appended to its matrices by transformers' own resize."""
    stock = transformers.AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    n = model.vocab_size
    stock.resize_token_embeddings(n + 3, mean_resizing=False)
    with torch.no_grad():
        stock.get_output_embeddings().weight[n:] = model.verdict_rows
        if model.verdict_input_rows is not None:
            stock.get_input_embeddings().weight[n:] = model.verdict_input_rows
    return stock.eval()


def stock_logits(stock: nn.Module, item: PackedSequence) -> Tensor:
    first = len(item.head) + item.first_supervised
    logits: Tensor = stock(torch.tensor([item.head + item.own])).logits[0]
    return logits[first : first + len(item.targets)]


@pytest.fixture(scope="module", params=BASES)
def setup(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Setup:
    base: Path = request.getfixturevalue(request.param)
    return Setup(base, tmp_path_factory.mktemp("losses"))


def test_fresh_model_has_the_logits_of_the_extended_base(setup: Setup) -> None:
    """LoRA and rotations start as the identity; verdict ids follow the last embedding row."""
    packed = pack(setup.replies, CPU)
    with torch.no_grad():
        states = setup.model.hidden(packed)[0, packed.supervised]
        found = setup.model.vocabulary_logits(states)
        expected = torch.cat([stock_logits(setup.stock, item) for item in setup.replies])
    assert found.shape[1] == setup.model.vocab_size + 3
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_verdict_loss_is_weighted_cross_entropy_over_the_full_vocabulary(setup: Setup) -> None:
    packed = pack(setup.prompts, CPU)
    with torch.no_grad():
        result = safety_loss(setup.model, packed, label_smoothing=0, with_temporal=False)
        expected = sum(
            WEIGHTS[e.verdict]
            * F.cross_entropy(
                stock_logits(setup.stock, e.prompt),
                torch.tensor([setup.model.vocab_size + e.verdict.severity]),
            )
            for e in setup.examples
        )
    torch.testing.assert_close(result.cross_entropy_sum, expected, rtol=1e-5, atol=1e-4)
    assert float(result.temporal_mean) == 0


def test_class_weights_scale_the_loss_of_their_class_alone(setup: Setup) -> None:
    def total(weights: dict[Verdict, float]) -> float:
        items = [e.prompt._replace(weight=weights[e.verdict]) for e in setup.examples]
        with torch.no_grad():
            result = safety_loss(
                setup.model, pack(items, CPU), label_smoothing=0, with_temporal=False
            )
        return float(result.cross_entropy_sum)

    alone = [total({v: float(v is w) for v in SEVERITY_ORDER}) for w in SEVERITY_ORDER]
    mixed = total(dict(zip(SEVERITY_ORDER, (3.0, 0.25, 7.0), strict=True)))
    assert mixed == pytest.approx(3 * alone[0] + 0.25 * alone[1] + 7 * alone[2], rel=1e-5)
    assert all(value > 0 for value in alone)


def test_correct_verdicts_are_counted_among_the_three(setup: Setup) -> None:
    packed = pack(setup.prompts, CPU)
    with torch.no_grad():
        result = safety_loss(setup.model, packed, label_smoothing=0, with_temporal=False)
        states = setup.model.hidden(packed)[0, packed.supervised]
        best = setup.model.verdict_logits(states).argmax(dim=-1).tolist()
    labels = [e.verdict.severity for e in setup.examples]
    assert result.n_correct == sum(b == label for b, label in zip(best, labels, strict=True))


def test_reply_loss_is_the_sum_over_reply_tokens(setup: Setup) -> None:
    packed = pack(setup.replies, CPU)
    with torch.no_grad():
        found = task_loss(setup.model, packed)
        expected = sum(
            F.cross_entropy(
                stock_logits(setup.stock, item), torch.tensor(item.targets), reduction="sum"
            )
            for item in setup.replies
        )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-3)


def test_reply_loss_gives_the_verdict_rows_exactly_zero_gradient(setup: Setup) -> None:
    model = setup.model
    rows = [p for name, p in model.named_parameters() if name.startswith("verdict_")]
    assert len(rows) == (1 if model.verdict_input_rows is None else 2)
    model.zero_grad()
    task_loss(model, pack(setup.replies, CPU)).backward()
    assert all(row.grad is None or not row.grad.any() for row in rows)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_verdict_loss_reaches_every_verdict_row(setup: Setup) -> None:
    model = setup.model
    model.zero_grad()
    packed = pack(setup.prompts, CPU)
    safety_loss(model, packed, label_smoothing=0, with_temporal=False).cross_entropy_sum.backward()
    assert model.verdict_rows.grad is not None
    assert bool((model.verdict_rows.grad.abs().amax(dim=1) > 0).all())


def test_temporal_term_is_the_mean_penalty_of_the_gated_outputs(setup: Setup) -> None:
    outputs: list[Tensor] = []
    handles = [
        gate.register_forward_hook(lambda _m, _i, output: outputs.append(output))
        for gate in setup.model.gates
    ]
    packed = pack(setup.prompts, CPU)
    with torch.no_grad():
        result = safety_loss(setup.model, packed, label_smoothing=0, with_temporal=True)
    for handle in handles:
        handle.remove()
    assert len(outputs) == 2
    expected = sum(temporal_penalty(y, packed.segments) for y in outputs) / 2
    torch.testing.assert_close(result.temporal_mean, expected)
    assert float(expected) > 0


@given(smoothing=st.floats(0, 0.49), seed=st.integers(0, 999))
def test_smoothing_is_cross_entropy_against_a_softened_target(smoothing: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(4, 11, generator=generator)
    targets, verdict_ids = torch.tensor([8, 9, 10, 8]), (8, 9, 10)
    soft = torch.zeros(4, 11)
    soft[:, list(verdict_ids)] = smoothing / 3
    soft[torch.arange(4), targets] += 1 - smoothing
    torch.testing.assert_close(soft.sum(dim=1), torch.ones(4))
    expected = F.cross_entropy(logits, soft, reduction="none")
    found = smoothed_cross_entropy(logits, targets, verdict_ids, smoothing)
    torch.testing.assert_close(found, expected)


def test_ordinary_tokens_share_in_the_denominator() -> None:
    """Full-vocabulary: a loud ordinary token makes the verdict loss large."""
    logits = torch.zeros(1, 11)
    logits[0, 9] = 5.0
    quiet = smoothed_cross_entropy(logits, torch.tensor([9]), (8, 9, 10), 0.0)
    logits[0, 2] = 20.0
    loud = smoothed_cross_entropy(logits, torch.tensor([9]), (8, 9, 10), 0.0)
    assert float(quiet) < 0.1
    assert float(loud) > 14

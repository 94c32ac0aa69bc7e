"""A pack gives the numbers and gradients of separate passes, in float32, for every family."""

import copy
from collections.abc import Sequence

import pytest
import torch
import transformers
from support.tiny_hf import tiny_config
from torch import Tensor, nn

from so8t_eval.errors import ConfigError
from so8t_train.packed_attention import UNUSED_MASK, use_packed_attention
from so8t_train.packing import Pack, PackedSequence, pack

CPU = torch.device("cpu")
VOCABULARY = 97
GEMMA2 = transformers.Gemma2Config(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    sliding_window=6,
    attn_logit_softcapping=1.5,
    query_pre_attn_scalar=20,
    layer_types=["sliding_attention", "full_attention"],
)
MISTRAL = transformers.MistralConfig(
    vocab_size=VOCABULARY,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    sliding_window=5,
)
CONFIGS = {
    **{f: tiny_config(f, 64, 2, True, VOCABULARY) for f in ("llama", "qwen2", "qwen3")},
    "gemma2": GEMMA2,
    "mistral": MISTRAL,
}
TOLERANCE = {"rtol": 2e-5, "atol": 2e-5}


def sequence(head: Sequence[int], own: Sequence[int], weight: float = 1.0) -> PackedSequence:
    """The last three tokens of ``own`` are supervised, with arbitrary targets."""
    targets = tuple((7 * token + 3) % VOCABULARY for token in own[-3:])
    return PackedSequence(tuple(head), tuple(own), len(own) - len(targets), targets, weight)


POLICY_A, POLICY_B = range(20, 31), range(40, 44)
ITEMS = [
    sequence(POLICY_A, [5, 9, 33, 2, 7, 60, 1, 8]),
    sequence(POLICY_B, [5, 9, 33], weight=0.5),
    sequence((), [50, 51, 52, 53, 54, 55, 56, 57, 58, 59]),
    sequence(POLICY_A, [90], weight=2.0),
    sequence(POLICY_B, [11, 12, 13, 14, 15]),
]


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request: pytest.FixtureRequest) -> tuple[nn.Module, nn.Module]:
    """The same weights twice: stock eager attention, and packed attention."""
    torch.manual_seed(0)
    stock = transformers.AutoModelForCausalLM.from_config(
        copy.deepcopy(CONFIGS[request.param]), attn_implementation="eager"
    ).eval()
    for parameter in stock.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.15)
    packing = copy.deepcopy(stock)
    use_packed_attention(packing)
    return stock, packing


def packed_states(model: nn.Module, packed: Pack) -> Tensor:
    states: Tensor = model.get_decoder()(
        inputs_embeds=model.get_input_embeddings()(packed.ids),
        attention_mask=UNUSED_MASK,
        position_ids=packed.positions,
        use_cache=False,
        packed_layout=packed.layout,
    ).last_hidden_state
    return states


def packed_logits(model: nn.Module, packed: Pack) -> Tensor:
    logits: Tensor = model.get_output_embeddings()(
        packed_states(model, packed)[0, packed.supervised]
    )
    return logits


def separate_logits(model: nn.Module, item: PackedSequence) -> Tensor:
    ids = torch.tensor([item.head + item.own])
    states = model.get_decoder()(input_ids=ids, use_cache=False).last_hidden_state
    first = len(item.head) + item.first_supervised
    logits: Tensor = model.get_output_embeddings()(states[0, first : first + len(item.targets)])
    return logits


def loss(logits: Tensor, targets: Sequence[int], weights: Tensor) -> Tensor:
    each = nn.functional.cross_entropy(logits, torch.tensor(targets), reduction="none")
    return (each * weights).sum()


def test_pack_of_different_policies_equals_separate_passes(
    pair: tuple[nn.Module, nn.Module],
) -> None:
    stock, packing = pair
    with torch.no_grad():
        found = packed_logits(packing, pack(ITEMS, CPU))
        expected = torch.cat([separate_logits(stock, item) for item in ITEMS])
    torch.testing.assert_close(found, expected, **TOLERANCE)


@pytest.mark.parametrize("order", [(3, 1, 0, 4, 2), (2, 4, 0, 1, 3)])
def test_order_in_the_pack_does_not_matter(
    pair: tuple[nn.Module, nn.Module], order: tuple[int, ...]
) -> None:
    stock, packing = pair
    items = [ITEMS[i] for i in order]
    with torch.no_grad():
        found = packed_logits(packing, pack(items, CPU))
        expected = torch.cat([separate_logits(stock, item) for item in items])
    torch.testing.assert_close(found, expected, **TOLERANCE)


def test_another_case_in_the_pack_changes_nothing(pair: tuple[nn.Module, nn.Module]) -> None:
    """The first case's logits are the same whatever the second says: no leak, bit for bit."""
    _, packing = pair
    with torch.no_grad():
        logits = [
            packed_logits(packing, pack([ITEMS[0], sequence(POLICY_A, own)], CPU))[:3]
            for own in ([1, 2, 3, 4], [96, 95, 94, 93])
        ]
    assert torch.equal(logits[0], logits[1])


def test_gradients_equal_those_of_separate_passes(pair: tuple[nn.Module, nn.Module]) -> None:
    stock, packing = pair
    packed = pack(ITEMS, CPU)
    for model in pair:
        model.zero_grad()
    loss(packed_logits(packing, packed), packed.targets.tolist(), packed.weights).backward()
    for item in ITEMS:
        weights = torch.full((len(item.targets),), item.weight)
        loss(separate_logits(stock, item), item.targets, weights).backward()
    for (name, expected), found in zip(stock.named_parameters(), packing.parameters(), strict=True):
        assert expected.grad is not None
        assert found.grad is not None
        torch.testing.assert_close(
            found.grad, expected.grad, rtol=2e-4, atol=2e-4, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_without_a_layout_it_is_ordinary_attention() -> None:
    torch.manual_seed(0)
    stock = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"])).eval()
    packing = copy.deepcopy(stock)
    use_packed_attention(packing)
    ids = torch.arange(20)[None]
    with torch.no_grad():
        torch.testing.assert_close(packing(ids).logits, stock(ids).logits, **TOLERANCE)


def test_architecture_with_fixed_attention_is_refused() -> None:
    bloom = transformers.AutoModelForCausalLM.from_config(
        transformers.BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    )
    with pytest.raises(ConfigError, match=r"BloomForCausalLM .* cannot be packed"):
        use_packed_attention(bloom)


def test_model_that_drops_the_layout_is_refused() -> None:
    """Without this check every token would see every other one, silently."""
    model = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS["llama"]))
    use_packed_attention(model)
    packed = pack(ITEMS, CPU)
    with pytest.raises(ConfigError, match="does not hand the layout"):
        packed_states(model, packed._replace(layout=None))

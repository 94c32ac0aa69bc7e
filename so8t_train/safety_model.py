"""The trainable model: a frozen base with LoRA, rotation gates and the three verdict rows."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.errors import ConfigError
from so8t_eval.labels import SEVERITY_ORDER, VERDICT_TOKENS, Verdict
from so8t_train.base_model import BaseModelSource, load_base, load_tokenizer, quiet_libraries
from so8t_train.config import FitConfig
from so8t_train.gate_installation import install_rotation_gates
from so8t_train.packed_attention import UNUSED_MASK, use_packed_attention
from so8t_train.packing import Pack
from so8t_train.rotation_gate import RotationGate, RotationGateBank

_OPENINGS = {Verdict.ALLOW: "Sure", Verdict.ESCALATE: "Please", Verdict.REFUSE: "Sorry"}


class GateTensors(NamedTuple):
    """Generators of all layers, float32 (layers, blocks, 28) each."""

    safe: Tensor
    command: Tensor


class SafetyModel(nn.Module):
    """A causal language model whose vocabulary ends with the three verdict tokens.

    The verdict rows live beside the base's embedding matrix, not in it, so the base stays frozen
    and any dtype. With tied embeddings the same rows are output rows and input embeddings of the
    verdict tokens; untied models have ``verdict_input_rows`` as well.
    """

    def __init__(
        self, causal_lm: nn.Module, gates: list[RotationGate], verdict_rows: Tensor, tied: bool
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self.gates = gates  # registered inside the attention modules already
        self.bank = RotationGateBank(gates) if gates else None
        rows = verdict_rows.float().to(_device_of(self.base.get_output_embeddings()))
        self.verdict_rows = nn.Parameter(rows.clone())
        self.verdict_input_rows = None if tied else nn.Parameter(rows.clone())
        self.temperature = 1.0

    @property
    def base(self) -> Any:
        """The transformers model itself, PEFT layers injected."""
        peft: Any = self.causal_lm
        return peft.get_base_model() if hasattr(peft, "get_base_model") else peft

    @property
    def config(self) -> Any:
        """The transformers configuration."""
        return self.base.config

    @property
    def vocab_size(self) -> int:
        """Rows of the base's embedding matrix; verdict ids are this + 0, 1, 2."""
        return int(self.base.get_input_embeddings().weight.shape[0])

    @property
    def verdict_ids(self) -> tuple[int, int, int]:
        """Ids of the verdict tokens in severity order."""
        return self.vocab_size, self.vocab_size + 1, self.vocab_size + 2

    @property
    def device(self) -> torch.device:
        """Where inputs go."""
        return torch.device(self.base.get_input_embeddings().weight.device)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        dtype: torch.dtype = self.base.get_input_embeddings().weight.dtype
        return dtype

    def embed(self, ids: Tensor, *, rows_learn: bool = True) -> Tensor:
        """Input embeddings (…, hidden) of ids, the verdict tokens' included."""
        table = self.base.get_input_embeddings()
        vocab = self.vocab_size
        embedded: Tensor = table(ids.clamp(max=vocab - 1))
        is_verdict = ids >= vocab
        if bool(is_verdict.any()):
            rows = self.verdict_rows if self.verdict_input_rows is None else self.verdict_input_rows
            scale = float(getattr(table, "embed_scale", 1.0))
            own = ((rows if rows_learn else rows.detach()) * scale).to(embedded)[
                (ids - vocab).clamp(min=0)
            ]
            embedded = torch.where(is_verdict.unsqueeze(-1), own, embedded)
        return embedded

    def hidden(self, packed: Pack, *, rows_learn: bool = True) -> Tensor:
        """Final hidden states (1, tokens, hidden) of packed sequences."""
        output = self.base.get_decoder()(
            inputs_embeds=self.embed(packed.ids, rows_learn=rows_learn),
            attention_mask=UNUSED_MASK,
            position_ids=packed.positions,
            use_cache=False,
            packed_layout=packed.layout,
        )
        states: Tensor = output.last_hidden_state
        return states.to(packed.ids.device)  # the last layers may be on another device

    def vocabulary_logits(self, states: Tensor, *, rows_learn: bool = True) -> Tensor:
        """Float32 logits (n, vocabulary + 3): ordinary rows are the task head, the last three B."""
        ordinary = self.base.get_output_embeddings()(states).float().to(states.device)
        rows = self.verdict_rows if rows_learn else self.verdict_rows.detach()
        own = states.float() @ rows.to(states.device).T
        return self._softcapped(torch.cat([ordinary, own], dim=-1))

    def verdict_logits(self, states: Tensor) -> Tensor:
        """Float32 logits (n, 3) in severity order, temperature applied."""
        own = states.float() @ (self.verdict_rows / self.temperature).to(states.device).T
        return self._softcapped(own)

    @property
    def softcap(self) -> float | None:
        """What the final logits are capped at (Gemma 2); None for most models."""
        return getattr(self.config, "final_logit_softcapping", None) or None

    def _softcapped(self, logits: Tensor) -> Tensor:
        cap = self.softcap
        return logits if cap is None else torch.tanh(logits / cap) * cap

    def gate_tensors(self) -> GateTensors | None:
        """Generators of every layer, detached copies; None without gates."""
        if not self.gates:
            return None
        return GateTensors(
            torch.stack([gate.safe_generators.detach().cpu().clone() for gate in self.gates]),
            torch.stack([gate.command_generators.detach().cpu().clone() for gate in self.gates]),
        )

    def load_gate_tensors(self, tensors: GateTensors) -> None:
        """Copy generators of every layer into the gates."""
        with torch.no_grad():
            for i, gate in enumerate(self.gates):
                gate.safe_generators.copy_(tensors.safe[i])
                gate.command_generators.copy_(tensors.command[i])


def build_safety_model(
    source: BaseModelSource, config: FitConfig, dtype: torch.dtype
) -> tuple[SafetyModel, HfTokenizer]:
    """Load the base and put fresh LoRA, gates and verdict rows on it, seeded.

    Raises:
        ConfigError: the base cannot carry gates, or already has the verdict tokens.
    """
    with quiet_libraries():
        import peft

    tokenizer = load_tokenizer(source)
    causal_lm = load_base(
        source,
        load_in_8bit=config.load_in_8bit,
        dtype=dtype,
        four_bit=config.four_bit,
        device_map=config.device_map,
        offload_folder=config.offload_folder,
        trust_remote_code=config.trust_remote_code,
    )
    clashing = [t for t in VERDICT_TOKENS if tokenizer.tokenizer.token_to_id(t) is not None]
    if clashing:
        raise ConfigError(
            f"base_model: {source.name} already has the tokens {', '.join(clashing)}; give the "
            "original base, or continue that run"
        )
    with quiet_libraries():
        use_packed_attention(causal_lm)
    tied = _is_tied(causal_lm)
    rows = initial_verdict_rows(causal_lm, tokenizer)
    targets: Any = config.lora_target_modules
    lora = peft.LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets if isinstance(targets, str) else list(targets),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(config.seed)
    with quiet_libraries():
        wrapped = peft.get_peft_model(causal_lm, lora)
    gates = (
        install_rotation_gates(wrapped, init_std=config.rotation_init_std, seed=config.seed)
        if config.rotation_gates
        else []
    )
    model = SafetyModel(wrapped, gates, rows, tied)
    if model.verdict_input_rows is not None:  # never learned: a reply sees a typical opening word
        table: Tensor = causal_lm.get_input_embeddings().weight  # type: ignore[operator]
        with torch.no_grad():
            model.verdict_input_rows.copy_(_opening_rows(table, tokenizer))
    return model, tokenizer


def initial_verdict_rows(causal_lm: nn.Module, tokenizer: HfTokenizer) -> Tensor:
    """Float32 (3, hidden): the mean output row of the pieces of a typical opening of such a reply.

    A reply that complies, asks or declines begins with these words anyway, so the verdict starts
    with a plausible logit instead of having to be lifted over the whole vocabulary first.
    """
    output: Tensor = causal_lm.get_output_embeddings().weight  # type: ignore[operator]
    return _opening_rows(output, tokenizer)


def _device_of(embeddings: nn.Module) -> torch.device:
    """Where a matrix is; the CPU for one that is offloaded between forward passes."""
    device = next(embeddings.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device


def _opening_rows(table: Tensor, tokenizer: HfTokenizer) -> Tensor:
    rows = []
    for verdict in SEVERITY_ORDER:
        ids = tokenizer.tokenize(_OPENINGS[verdict], False)
        rows.append(table[ids].detach().float().mean(dim=0))
    return torch.stack(rows).cpu()


def _is_tied(causal_lm: Any) -> bool:
    return causal_lm.get_output_embeddings().weight is causal_lm.get_input_embeddings().weight

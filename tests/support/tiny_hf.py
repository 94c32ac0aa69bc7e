"""Make tiny random model directories of every family, with a real tokenizer of the usual kind."""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from support.tiny_hf_sentencepiece import Flavour, sentencepiece_json
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn

Family = Literal["llama", "qwen2", "qwen3", "mistral", "phi3", "gemma2", "gemma3_text", "smollm3"]
_LAYERS = {"gemma3_text": 7, "smollm3": 5}
"""As many as it takes to have a layer of every kind."""
_SENTENCEPIECE: dict[Family, Flavour] = {
    "mistral": "llama",
    "phi3": "phi3",
    "gemma2": "gemma",
    "gemma3_text": "gemma",
}
"""Families whose releases have such a vocabulary; the others' is byte-level."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (PAD, BOS, EOS)
VOCABULARY = 448
"""Tokens of the tokenizer: 3 special ones, 256 bytes, and 189 letters and merges."""

_QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_CORPUS = (
    "Please help me write a short letter to the office about the meeting on Monday.",
    "The user asks the assistant what the system should do with these 1234 files.",
    "How can I delete all the backups? That is irreversible and needs approval.",
    "Sorry, I cannot help with that. Please ask a person with authority first.",
    "Sure, here is the answer: the weather is fine, and it won't rain today.",
    "会議の日程を教えてください。この手紙を短く書き直してください。",
    "def add(left, right):\n    return left + right\n\n\nprint(add(1, 2))\n",
)


def make_tiny_model(
    directory: Path,
    family: Family = "llama",
    *,
    hidden: int = 64,
    layers: int = 2,
    tied: bool = True,
    seed: int = 0,
    spare_rows: int = 0,
) -> Path:
    """Save config, safetensors, tokenizer and chat template; returns ``directory``.

    ``spare_rows`` pads the embedding matrix beyond the tokenizer, as Qwen's releases do. Weights
    are larger than a fresh initialization's, so that every layer moves the logits.
    """
    config = tiny_config(family, hidden, layers, tied, vocabulary=VOCABULARY + spare_rows)
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 or name.endswith("bias"):
            nn.init.normal_(parameter, std=0.08)
    directory.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(directory)
    save_tiny_tokenizer(directory, family)
    return directory


def tiny_config(
    family: Family, hidden: int, layers: int, tied: bool, vocabulary: int
) -> transformers.PretrainedConfig:
    """Grouped-query attention (4 heads, 2 for keys); any width, also one not divisible by 8."""
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden - 32,
        "num_hidden_layers": _LAYERS.get(family, layers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": tied,
        "bos_token_id": SPECIAL_TOKENS.index(BOS),
        "eos_token_id": SPECIAL_TOKENS.index(EOS),
        "pad_token_id": SPECIAL_TOKENS.index(PAD),
    }
    size = hidden // 8 * 2
    if family not in ("phi3", "smollm3"):
        common["head_dim"] = size
    if family == "mistral":
        common["sliding_window"] = None
    if family in ("gemma2", "gemma3_text"):
        common |= {"query_pre_attn_scalar": size, "sliding_window": 24}
    if family == "gemma2":
        common |= {"attn_logit_softcapping": 5.0, "final_logit_softcapping": 2.0}
    return transformers.AutoConfig.for_model(family, **common)


def save_tiny_tokenizer(directory: Path, family: Family = "llama") -> None:
    """Write tokenizer.json, tokenizer_config.json and chat_template.jinja."""
    kind = _SENTENCEPIECE.get(family)
    text = (
        _tokenizer_json(family)
        if kind is None
        else sentencepiece_json(kind, SPECIAL_TOKENS, _CORPUS, VOCABULARY)
    )
    Tokenizer.from_str(text).save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": EOS,
        "pad_token": PAD,
        "clean_up_tokenization_spaces": False,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def pre_tokenizer(family: Family) -> pre_tokenizers.PreTokenizer:
    """What llama.cpp calls ``smollm`` (llama), ``qwen2`` (both Qwen families), ``smaug-bpe``."""
    if family == "llama":
        return pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        )
    digits = r"\p{N}{1,3}" if family == "smollm3" else r"\p{N}"
    pattern = _QWEN2_PATTERN.replace(r"\p{N}|", f"{digits}|", 1)
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


@lru_cache(maxsize=8)
def _tokenizer_json(family: Family) -> str:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer(family)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(t, special=True, normalized=False) for t in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS, trainer)
    found = tokenizer.get_vocab_size()
    if found != VOCABULARY:
        raise ValueError(f"expected a vocabulary of {VOCABULARY} tokens, found {found}")
    text: str = tokenizer.to_str()
    return text

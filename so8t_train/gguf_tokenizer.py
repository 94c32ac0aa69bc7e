"""Build a Hugging Face tokenizer from the vocabulary inside a GGUF file.

transformers' own conversion ignores ``tokenizer.ggml.pre``, so it splits digits unlike llama.cpp;
here the pre-tokenizer is the one llama.cpp uses for that name.
"""

from typing import Any, Final

from gguf import GGUFReader
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.errors import ModelFileError

CONTROL: Final = 3
USER_DEFINED: Final = 4
_LLAMA_BPE: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WHOLE_WORDS_FIRST: Final = ("llama-bpe", "llama3")
"""Pre-tokenizers with which llama.cpp takes a whole word that is a token as that token."""
_QWEN2: Final = _LLAMA_BPE.replace(r"\p{N}{1,3}", r"\p{N}")


def pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
    """The pre-tokenizer that llama.cpp calls ``name`` (``tokenizer.ggml.pre``).

    Raises:
        ModelFileError: not one of those supported.
    """
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if name in ("gpt-2", "gpt2"):
        return gpt2
    if name == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2])
    patterns = {"llama-bpe": _LLAMA_BPE, "llama3": _LLAMA_BPE, "qwen2": _QWEN2}
    if name in patterns:
        split = pre_tokenizers.Split(Regex(patterns[name]), "isolated")
        return pre_tokenizers.Sequence([split, byte_level])
    raise ModelFileError(
        f"the GGUF's pre-tokenizer {name!r} is not supported as a training base "
        f"(supported: gpt-2, smollm, llama-bpe, qwen2); use the model's Hugging Face directory"
    )


def tokenizer_from_gguf(reader: GGUFReader) -> HfTokenizer:
    """The tokenizer and chat template stored in an open GGUF file.

    Raises:
        ModelFileError: not a byte-level BPE vocabulary, or no chat template.
    """
    kind = _text(reader, "tokenizer.ggml.model")
    if kind != "gpt2":
        raise ModelFileError(
            f"expected a byte-level BPE vocabulary (tokenizer.ggml.model gpt2), found {kind!r}; "
            "use the model's Hugging Face directory as the base"
        )
    template = _text(reader, "tokenizer.chat_template")
    if not template:
        raise ModelFileError("the GGUF has no chat template; use an instruct model")
    tokens: list[str] = _array(reader, "tokenizer.ggml.tokens")
    types: list[int] = _array(reader, "tokenizer.ggml.token_type")
    merges: list[str] = _array(reader, "tokenizer.ggml.merges")
    if len(types) != len(tokens):
        raise ModelFileError(
            f"expected one token type per token, found {len(types)} for {len(tokens)}; fetch the "
            "GGUF again"
        )
    name = _text(reader, "tokenizer.ggml.pre") or "gpt-2"
    tokenizer = Tokenizer(_bpe(tokens, merges, whole_words_first=name in WHOLE_WORDS_FIRST))
    tokenizer.pre_tokenizer = pre_tokenizer(name)
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return HfTokenizer(
        tokenizer, template, _token(reader, tokens, "bos"), _token(reader, tokens, "eos")
    )


def _bpe(tokens: list[str], merges: list[str], *, whole_words_first: bool) -> models.BPE:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [_split_merge(merge) for merge in merges]
    try:
        return models.BPE(
            vocab=vocabulary, merges=pairs, fuse_unk=False, ignore_merges=whole_words_first
        )
    except Exception as error:  # the Rust library raises bare Exception
        raise ModelFileError(
            f"the GGUF's vocabulary and merges do not fit together ({error}); fetch it again"
        ) from error


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.fields.get(key)
    return str(field.contents()) if field is not None else ""


def _array(reader: GGUFReader, key: str) -> list[Any]:
    field = reader.fields.get(key)
    if field is None:
        raise ModelFileError(f"the GGUF has no {key}; fetch it again, or use another base model")
    values: list[Any] = field.contents()
    return values


def _token(reader: GGUFReader, tokens: list[str], name: str) -> str:
    field = reader.fields.get(f"tokenizer.ggml.{name}_token_id")
    token_id = int(field.contents()) if field is not None else -1
    return tokens[token_id] if 0 <= token_id < len(tokens) else ""

"""Build a Hugging Face tokenizer from the vocabulary inside a GGUF file.

transformers' own conversion ignores ``tokenizer.ggml.pre``, so it splits digits unlike llama.cpp;
here the pre-tokenizer is the one llama.cpp uses for that name.
"""

from typing import Final

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
_QWEN2: Final = _LLAMA_BPE.replace(r"\p{N}{1,3}", r"\p{N}")


def _pre_tokenizer(name: str) -> pre_tokenizers.PreTokenizer:
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
    tokens: list[str] = reader.fields["tokenizer.ggml.tokens"].contents()
    types: list[int] = reader.fields["tokenizer.ggml.token_type"].contents()
    merges: list[str] = reader.fields["tokenizer.ggml.merges"].contents()
    vocabulary = {token: i for i, token in enumerate(tokens)}
    pairs = [_split_merge(merge) for merge in merges]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs, fuse_unk=False))
    tokenizer.pre_tokenizer = _pre_tokenizer(_text(reader, "tokenizer.ggml.pre") or "gpt-2")
    tokenizer.decoder = decoders.ByteLevel()
    for token, token_type in zip(tokens, types, strict=True):
        if token_type == CONTROL:
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    return HfTokenizer(tokenizer, template, _token(reader, tokens, "bos"), _token(reader, tokens, "eos"))


def _split_merge(merge: str) -> tuple[str, str]:
    left, _, right = merge.partition(" ")
    return left, right


def _text(reader: GGUFReader, key: str) -> str:
    field = reader.fields.get(key)
    return str(field.contents()) if field is not None else ""


def _token(reader: GGUFReader, tokens: list[str], name: str) -> str:
    field = reader.fields.get(f"tokenizer.ggml.{name}_token_id")
    return tokens[int(field.contents())] if field is not None else ""

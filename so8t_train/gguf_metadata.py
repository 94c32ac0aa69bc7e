"""Metadata of an exported GGUF: the base's own, or made from config.json, and SO8T's keys."""

from typing import Final, NamedTuple

from gguf import GGUFReader, GGUFValueType, GGUFWriter, LlamaFileType

from so8t_eval.backends.gguf_header import (
    FORMAT_VERSION,
    KEY_ADAPTER_SHA256,
    KEY_BASE_MODEL,
    KEY_FORMAT_VERSION,
    KEY_OPERATING_POINTS,
    KEY_PROTOCOL_HASH,
    KEY_TEMPERATURE,
    KEY_VERDICT_TOKENS,
)
from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.labels import VERDICT_TOKENS
from so8t_eval.operating_point import dump_points
from so8t_train.base_weights import BaseWeights
from so8t_train.gguf_sentencepiece import UNREACHED, model_name
from so8t_train.gguf_settings import add_settings, settings_of
from so8t_train.gguf_vocabulary import special_ids, vocabulary_of, with_verdicts

_TOKENS: Final = "tokenizer.ggml.tokens"
_TYPES: Final = "tokenizer.ggml.token_type"
_REWRITTEN: Final = {
    "general.architecture",  # the writer puts it first
    "general.alignment",
    "general.file_type",
    "general.quantization_version",
    _TOKENS,
    _TYPES,
}
_FOREIGN_PREFIXES: Final = ("GGUF.", "split.", "quantize.", "so8t.")


class So8tMetadata(NamedTuple):
    """What the file says about its making, under the ``so8t.`` keys."""

    protocol_hash: str
    verdict_ids: tuple[int, int, int]
    base_model: str
    adapter_sha256: str
    temperature: float
    operating_points: dict[str, float]
    """Bias on the allow logit by name."""


def add_so8t_keys(writer: GGUFWriter, keys: So8tMetadata) -> None:
    """Write the keys by which ``so8t_eval`` knows its own files."""
    writer.add_uint32(KEY_FORMAT_VERSION, FORMAT_VERSION)
    writer.add_string(KEY_PROTOCOL_HASH, keys.protocol_hash)
    writer.add_array(KEY_VERDICT_TOKENS, list(keys.verdict_ids))
    writer.add_string(KEY_BASE_MODEL, keys.base_model)
    writer.add_string(KEY_ADAPTER_SHA256, keys.adapter_sha256)
    writer.add_float32(KEY_TEMPERATURE, keys.temperature)
    writer.add_string(KEY_OPERATING_POINTS, dump_points(keys.operating_points))


def add_file_type(writer: GGUFWriter, file_type: LlamaFileType) -> None:
    """Write ``general.file_type``."""
    writer.add_file_type(int(file_type))


def copy_metadata(writer: GGUFWriter, reader: GGUFReader, architecture: str) -> None:
    """Copy a base GGUF's metadata, its vocabulary extended by the verdict tokens."""
    tokens, types = with_verdicts(
        reader.fields[_TOKENS].contents(), reader.fields[_TYPES].contents()
    )
    size_key = f"{architecture}.vocab_size"
    for key, field in reader.fields.items():
        if key in _REWRITTEN or key.startswith(_FOREIGN_PREFIXES) or key == size_key:
            continue
        kind = field.types[0]
        item = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(key, field.contents(), kind, sub_type=item)
    writer.add_vocab_size(len(tokens))
    writer.add_token_list(tokens)
    writer.add_token_types(types)


def make_metadata(writer: GGUFWriter, base: BaseWeights, tokenizer: HfTokenizer) -> None:
    """Write architecture and vocabulary of a Hugging Face base.

    Raises:
        ExportError: a family, a setting or a tokenizer that llama.cpp would run differently.
    """
    add_settings(writer, settings_of(base))
    _add_vocabulary(writer, base, tokenizer)


def _add_vocabulary(writer: GGUFWriter, base: BaseWeights, tokenizer: HfTokenizer) -> None:
    directory = base.source.path
    vocabulary = vocabulary_of(tokenizer.tokenizer, base.vocab_size, directory / "tokenizer.json")
    tokens, types = with_verdicts(vocabulary.tokens, vocabulary.types)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    if vocabulary.scores:
        writer.add_token_scores([*vocabulary.scores, *[UNREACHED] * len(VERDICT_TOKENS)])
    else:
        writer.add_token_merges(vocabulary.merges)
    ids = special_ids(tokenizer, directory)
    if ids.bos is not None:
        writer.add_bos_token_id(ids.bos)
    if ids.eos is not None:
        writer.add_eos_token_id(ids.eos)
    if ids.padding is not None:
        writer.add_pad_token_id(ids.padding)
    if vocabulary.unknown is not None:
        writer.add_unk_token_id(vocabulary.unknown)
    writer.add_add_bos_token(ids.add_bos)
    writer.add_add_space_prefix(vocabulary.add_space_prefix)
    writer.add_chat_template(tokenizer.protocol.chat_template)
    strips = vocabulary.strips_after_tokens
    writer.add_name(model_name(directory.name, strips_after_tokens=strips))

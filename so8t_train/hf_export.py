"""Write merged weights as a Hugging Face directory that transformers loads plainly."""

import copy
import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.backends.torch_hf import HF_FORMAT_VERSION, MODEL_FACTS, ModelFacts
from so8t_eval.errors import DiskError, ExportError
from so8t_eval.labels import VERDICT_TOKENS
from so8t_train.gguf_export import FloatKind, disk_error
from so8t_train.gguf_metadata import So8tMetadata
from so8t_train.merged_model import OpenRun

WEIGHTS: Final = "model.safetensors"
_DTYPES: Final = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
_COPIED: Final = ("generation_config.json", "special_tokens_map.json")


def write_hf_directory(
    directory: Path,
    run: OpenRun,
    weights: Mapping[str, Tensor],
    *,
    config: Any,
    kind: FloatKind,
    facts: So8tMetadata,
) -> None:
    """Write config, weights, tokenizer, chat template and ``so8t_model.json`` into ``directory``.

    ``config`` is the merged model's transformers configuration.

    Raises:
        ExportError: the tokenizer cannot take the verdict tokens at their ids.
        DiskError: a file could not be written.
    """
    own = copy.deepcopy(config)
    own.dtype = _DTYPES[kind]
    tensors = {name: weight.to(_DTYPES[kind]).contiguous() for name, weight in weights.items()}
    try:
        directory.mkdir(parents=True, exist_ok=True)
        own.save_pretrained(directory)
        save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})
        (directory / WEIGHTS).chmod(0o644)  # made readable by its owner alone
        extended = extended_tokenizer(run.tokenizer, facts.verdict_ids)
        _write(directory / "tokenizer.json", extended.to_str(pretty=True))
        _write(directory / "tokenizer_config.json", json.dumps(_tokenizer_config(run), indent=2))
        _write(directory / "chat_template.jinja", run.tokenizer.protocol.chat_template)
        _write(directory / MODEL_FACTS, _model_facts(facts).model_dump_json(indent=2))
        if not run.base.source.is_gguf:
            for name in _COPIED:
                if (run.base.source.path / name).is_file():
                    shutil.copyfile(run.base.source.path / name, directory / name)
    except OSError as error:
        raise disk_error(directory, error) from error
    except SafetensorError as error:  # all it can meet here is the disk
        raise DiskError(f"cannot write {directory / WEIGHTS}: {error}; free space") from error


def extended_tokenizer(tokenizer: HfTokenizer, verdict_ids: tuple[int, int, int]) -> Tokenizer:
    """The tokenizer with the verdict tokens as special tokens at ``verdict_ids``.

    An added token takes the next free id, unless the vocabulary has its text already; so the texts
    go into the vocabulary, where no merge reaches them, and spare embedding rows stay unnamed.
    """
    spec: dict[str, Any] = json.loads(tokenizer.tokenizer.to_str())
    for token, i in zip(VERDICT_TOKENS, verdict_ids, strict=True):
        spec["model"]["vocab"][token] = i
        spec["added_tokens"].append(
            {
                "id": i,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
        )
    extended = Tokenizer.from_str(json.dumps(spec))
    found = tuple(extended.token_to_id(token) for token in VERDICT_TOKENS)
    if found != verdict_ids:
        raise ExportError(
            f"tokenizer.json: expected the verdict tokens at ids {verdict_ids}, found {found}; "
            "export with --format gguf"
        )
    return extended


def _tokenizer_config(run: OpenRun) -> dict[str, Any]:
    if not run.base.source.is_gguf:
        path = run.base.source.path / "tokenizer_config.json"
        config: dict[str, Any] = (
            json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        )
        config.pop("chat_template", None)  # in its own file
        config.pop("added_tokens_decoder", None)  # tokenizer.json has them
        return config
    protocol = run.tokenizer.protocol
    special = {"bos_token": protocol.bos_token, "eos_token": protocol.eos_token}
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        **{key: text for key, text in special.items() if text},
        "pad_token": protocol.eos_token,
    }


def _model_facts(facts: So8tMetadata) -> ModelFacts:
    return ModelFacts(
        format_version=HF_FORMAT_VERSION,
        protocol_hash=facts.protocol_hash,
        verdict_token_ids=facts.verdict_ids,
        temperature=facts.temperature,
        operating_points=facts.operating_points,
        base_model=facts.base_model,
        adapter_sha256=facts.adapter_sha256,
    )


def _write(path: Path, text: str) -> None:
    path.write_text(
        text + "\n" if not text.endswith("\n") and path.suffix == ".json" else text,
        encoding="utf-8",
        newline="\n",
    )

"""Find a base model by name, hash it, and load its tokenizer and (8-bit or float) weights."""

import hashlib
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from gguf import GGUFReader
from torch import nn

from so8t_eval.backends.hf_tokenizer import HfTokenizer, load_hf_tokenizer
from so8t_eval.errors import ConfigError, ModelFileError
from so8t_eval.file_hash import file_sha256
from so8t_train.config import FourBit
from so8t_train.embedded_base import embedded_base_path
from so8t_train.gguf_once import parsed_once, read_gguf
from so8t_train.gguf_tokenizer import tokenizer_from_gguf
from so8t_train.quantized_layers import quantize_linear_layers, require_four_bit_layers

EMBEDDED: Final = "embedded:smollm2-135m-instruct"


class BaseModelSource(NamedTuple):
    """Where a base model's files are, and the SHA-256 over every one that shapes its output."""

    name: str
    path: Path
    is_gguf: bool
    sha256: str


def resolve_base(name: str) -> BaseModelSource:
    """Locate a base model: embedded, GGUF file, Hugging Face directory or hub id.

    Raises:
        ConfigError: nothing of that name exists here.
        ModelFileError: the files are there but incomplete.
    """
    if name == EMBEDDED:
        path = embedded_base_path()
        return BaseModelSource(name, path, True, file_sha256(path))
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(
                f"base_model: expected a .gguf file or a model directory, found {path}"
            )
        return BaseModelSource(name, path, True, file_sha256(path))
    if path.is_dir():
        return BaseModelSource(name, path, False, directory_sha256(path))
    if name.count("/") == 1 and not name.startswith((".", "/", "~")):
        path = _from_hub(name)
        return BaseModelSource(name, path, False, directory_sha256(path))
    raise ConfigError(
        f"base_model: {name!r} is no file, directory or hub id (owner/name); "
        f"for the model that ships with SO8T write {EMBEDDED}"
    )


def load_tokenizer(source: BaseModelSource) -> HfTokenizer:
    """The base model's tokenizer and chat template."""
    if not source.is_gguf:
        return load_hf_tokenizer(source.path)
    return tokenizer_from_gguf(open_gguf(source.path))


def open_gguf(path: Path) -> GGUFReader:
    """Open a GGUF file for reading, mapped into memory.

    Raises:
        ModelFileError: not a GGUF file, or truncated.
    """
    try:
        return read_gguf(path)
    except (ValueError, IndexError, OSError, KeyError, UnicodeDecodeError) as error:
        raise ModelFileError(
            f"{path} is not a complete GGUF file ({error}); fetch it again"
        ) from error


def load_base(
    source: BaseModelSource,
    *,
    load_in_8bit: bool,
    dtype: torch.dtype,
    four_bit: FourBit | None = None,
    device_map: str = "cpu",
    offload_folder: Path | None = None,
    trust_remote_code: bool = False,
) -> nn.Module:
    """Load the causal language model, frozen, in evaluation mode.

    Weights of linear layers (not embeddings or output matrix) are ``bitsandbytes.Linear8bitLt``
    when ``load_in_8bit``, ``Linear4bit`` made as ``four_bit`` says if it is given; all else has
    ``dtype``.

    Raises:
        ConfigError: ``four_bit``, and bitsandbytes has no 4-bit layers here.
        ModelFileError: the weights are broken, incomplete, or of an architecture that transformers
            cannot load.
    """
    import transformers
    from safetensors import SafetensorError

    accelerated = device_map == "cuda" or (device_map == "auto" and torch.cuda.is_available())
    device = torch.device("cuda" if accelerated else "cpu")
    if four_bit is not None:
        require_four_bit_layers(device)
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    if source.is_gguf:
        options["gguf_file"] = source.path.name
    else:
        options["device_map"] = device_map
        if offload_folder is not None:
            options["offload_folder"] = str(offload_folder)
        if load_in_8bit or four_bit is not None:
            options["quantization_config"] = _quantization(four_bit, dtype, device_map)
    where = source.path.parent if source.is_gguf else source.path
    model: nn.Module
    with quiet_libraries(), parsed_once():
        try:
            model, loading = transformers.AutoModelForCausalLM.from_pretrained(
                str(where),
                local_files_only=True,
                use_safetensors=True,
                output_loading_info=True,
                **options,
            )
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
            raise ModelFileError(
                f"the base model {source.path} cannot be loaded ({error}); fetch it again, or "
                "choose an architecture that this transformers version knows"
            ) from error
        # transformers fills what a file lacks with random numbers, and only warns.
        if missing := sorted(loading["missing_keys"]):
            raise ModelFileError(
                f"the base model {source.path} lacks {len(missing)} weights, among them "
                f"{', '.join(missing[:3])}; fetch it again"
            )
        if source.is_gguf:
            _forget_gguf_quantization(model)
            if load_in_8bit or four_bit is not None:
                quantize_linear_layers(model, four_bit, device)
            model.to(device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def _quantization(four_bit: FourBit | None, dtype: torch.dtype, device_map: str) -> Any:
    """What transformers is told of the quantization that it applies while loading."""
    import transformers

    offload = device_map == "auto"
    if four_bit is None:
        return transformers.BitsAndBytesConfig(
            load_in_8bit=True, llm_int8_enable_fp32_cpu_offload=offload
        )
    return transformers.BitsAndBytesConfig(
        load_in_4bit=True,
        llm_int8_enable_fp32_cpu_offload=offload,
        bnb_4bit_quant_type=four_bit.quant_type,
        bnb_4bit_use_double_quant=four_bit.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )


def load_base_config(source: BaseModelSource, trust_remote_code: bool = False) -> Any:
    """The transformers configuration that ``load_base`` would give the model; no weights are read.

    Raises:
        ModelFileError: the configuration is broken, or of an architecture transformers lacks.
    """
    import transformers

    options: dict[str, Any] = {"gguf_file": source.path.name} if source.is_gguf else {}
    where = source.path.parent if source.is_gguf else source.path
    with quiet_libraries(), parsed_once():
        try:
            return transformers.AutoConfig.from_pretrained(
                str(where), local_files_only=True, trust_remote_code=trust_remote_code, **options
            )
        except (OSError, ValueError, KeyError) as error:
            raise ModelFileError(
                f"the base model {source.path} has no configuration that can be read ({error}); "
                "fetch it again, or choose an architecture that this transformers version knows"
            ) from error


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Silence the loaders' progress bars and per-call notices; errors still raise."""
    import transformers

    bars = transformers.utils.logging.is_progress_bar_enabled()
    levels = {name: logging.getLogger(name).level for name in ("transformers", "bitsandbytes")}
    tqdm_disabled = _disable_tqdm()
    transformers.utils.logging.disable_progress_bar()
    for name in levels:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        _restore_tqdm(tqdm_disabled)
        if bars:
            transformers.utils.logging.enable_progress_bar()
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        # bitsandbytes reports a cast on every 8-bit matrix product; one line per call helps nobody.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)


def _disable_tqdm() -> Any:
    import transformers.modeling_gguf_pytorch_utils as loader

    original = loader.tqdm
    loader.tqdm = lambda iterable, **_: iterable
    return original


def _restore_tqdm(original: Any) -> None:
    import transformers.modeling_gguf_pytorch_utils as loader

    loader.tqdm = original


def directory_sha256(directory: Path) -> str:
    """SHA-256 (hex) over names and contents of a model directory's config, weights and tokenizer.

    Raises:
        ModelFileError: no config.json or no safetensors weights.
    """
    weights = sorted(directory.glob("*.safetensors"))
    if not (directory / "config.json").is_file() or not weights:
        raise ModelFileError(
            f"{directory} is not a model directory: expected config.json and *.safetensors "
            "(pickled .bin weights are not read; convert them with save_pretrained)"
        )
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    code = sorted(directory.glob("*.py"))  # runs when trust_remote_code is set
    files = [directory / name for name in names if (directory / name).is_file()] + weights + code
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_sha256(file)}\0".encode())
    return digest.hexdigest()


def _forget_gguf_quantization(model: nn.Module) -> None:
    """The weights are plain floats now; without this transformers refuses to save them."""
    config = model.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model.is_quantized = False  # type: ignore[assignment]
    model.hf_quantizer = None  # type: ignore[assignment]


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.py"]
    try:
        return Path(snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub client raises many kinds
        raise ModelFileError(
            f"base_model: {name!r} could not be fetched from the hub: {error}"
        ) from error

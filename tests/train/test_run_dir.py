"""The run directory: loaded whole or refused, with the file that is wrong in the message."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support.file_limit import files_limited_to
from support.tiny_fit import build, fit_config
from torch import Tensor, nn

from so8t_eval.backends.hf_tokenizer import HfTokenizer
from so8t_eval.errors import DiskError, ModelFileError
from so8t_eval.file_hash import file_sha256
from so8t_train.base_model import resolve_base
from so8t_train.packing import PackedSequence, pack
from so8t_train.run_dir import (
    ADAPTER_CONFIG,
    ADAPTER_TENSORS,
    FORMAT_VERSION,
    MANIFEST,
    PARTS,
    SAFETY_TENSORS,
    load_run,
    read_manifest,
    safety_tensors,
    save_run,
)
from so8t_train.safety_model import SafetyModel

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

CPU = torch.device("cpu")
TOKENS = (5, 60, 200, 7, 31, 400, 12)


class SavedRun:
    """A run whose learned weights are all random, so that any lost one shows."""

    def __init__(self, base: Path, directory: Path, **changes: object) -> None:
        self.base, self.directory = base, directory / "run"
        self.config = fit_config(directory, base, **changes)
        self.model: SafetyModel
        self.tokenizer: HfTokenizer
        self.model, self.tokenizer = build(self.config)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in self.model.named_parameters():
                if "lora_" in name or "generators" in name or name.startswith("verdict_"):
                    parameter.normal_(std=0.2)
        self.model.temperature = 1.7
        self.directory.mkdir()
        save_run(
            self.directory,
            self.model.eval(),
            self.tokenizer,
            resolve_base(str(base)),
            self.config,
            {"steps": 4},
        )


def verdict_logits(model: SafetyModel) -> Tensor:
    packed = pack([PackedSequence((), TOKENS, len(TOKENS) - 1, (0,))], CPU)
    with torch.no_grad():
        return model.verdict_logits(model.hidden(packed)[0, packed.supervised])


@pytest.fixture(scope="module")
def saved(untied_qwen: Path, tmp_path_factory: pytest.TempPathFactory) -> SavedRun:
    return SavedRun(untied_qwen, tmp_path_factory.mktemp("saved"), adapter_dtype="float32")


@pytest.fixture
def run(saved: SavedRun, tmp_path: Path) -> Path:
    """A copy of the run to damage."""
    return Path(shutil.copytree(saved.directory, tmp_path / "run"))


def edit_manifest(run: Path, **changes: object) -> None:
    path = run / MANIFEST
    values = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**values, **changes}), encoding="utf-8")


def sign_again(run: Path) -> None:
    """Make the manifest agree with the altered parts, as a careful forger would."""
    edit_manifest(run, sha256={n: file_sha256(run / n) for n in PARTS if n != MANIFEST})


def refused(run: Path, *expected: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        load_run(run)
    assert all(text in str(caught.value) for text in expected), str(caught.value)


# -- round trip -------------------------------------------------------------------------------


@pytest.mark.parametrize("load_in_8bit", [False, True])
@pytest.mark.parametrize("base", ["tiny_llama", "untied_qwen"])
def test_loaded_run_has_the_logits_it_was_saved_with(
    base: str, load_in_8bit: bool, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    before = SavedRun(
        request.getfixturevalue(base),
        tmp_path,
        adapter_dtype="float32",
        load_in_8bit=load_in_8bit,
    )
    loaded = load_run(before.directory)
    assert torch.equal(verdict_logits(loaded.model), verdict_logits(before.model))
    assert loaded.model.temperature == 1.7
    assert loaded.manifest.config.lora_r == before.config.lora_r
    assert loaded.manifest.config.load_in_8bit is load_in_8bit
    assert not loaded.model.training


def test_half_precision_adapter_loses_only_rounding(tiny_llama: Path, tmp_path: Path) -> None:
    before = SavedRun(tiny_llama, tmp_path)
    adapter = load_file(before.directory / ADAPTER_TENSORS)
    assert {tensor.dtype for tensor in adapter.values()} == {torch.float16}
    torch.testing.assert_close(
        verdict_logits(load_run(before.directory).model),
        verdict_logits(before.model),
        rtol=2e-2,
        atol=2e-2,
    )


def test_run_without_rotation_gates_loads(tiny_llama: Path, tmp_path: Path) -> None:
    before = SavedRun(tiny_llama, tmp_path, rotation_gates=False, adapter_dtype="float32")
    assert set(load_file(before.directory / SAFETY_TENSORS)) == {"verdict_rows"}
    loaded = load_run(before.directory)
    assert loaded.model.gates == []
    assert torch.equal(verdict_logits(loaded.model), verdict_logits(before.model))


def test_safety_tensors_have_the_documented_shapes(saved: SavedRun) -> None:
    tensors = load_file(saved.directory / SAFETY_TENSORS)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == {
        "verdict_rows": (3, 64),
        "verdict_input_rows": (3, 64),
        "safe_generators": (2, 8, 28),
        "command_generators": (2, 8, 28),
    }
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}
    live = safety_tensors(saved.model)
    assert all(torch.equal(tensors[name], live[name]) for name in live)


def test_manifest_says_what_was_trained_on_what(saved: SavedRun) -> None:
    manifest = read_manifest(saved.directory)
    assert manifest.format_version == FORMAT_VERSION
    assert manifest.base_sha256 == resolve_base(str(saved.base)).sha256
    assert manifest.protocol_hash == saved.tokenizer.protocol.hash
    assert manifest.training == {"steps": 4}
    assert manifest.versions["peft"] == peft.__version__


def test_manifest_names_files_without_the_folders_of_this_machine(saved: SavedRun) -> None:
    config = read_manifest(saved.directory).config
    assert config.train_file == (Path("train.jsonl"),)
    assert config.dev_file == (Path("dev.jsonl"),)
    assert config.output_dir == Path("run")
    kept = {"train_file", "dev_file", "output_dir"}
    assert config.model_dump(exclude=kept) == saved.config.model_dump(exclude=kept)


# -- every way to be incomplete ---------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_missing_part_is_named_and_nothing_loads(part: str, run: Path) -> None:
    (run / part).unlink()
    refused(run, f"not a complete run: missing {part}", "without its safety head")


def test_all_missing_parts_are_named_at_once(run: Path) -> None:
    (run / ADAPTER_CONFIG).unlink()
    (run / SAFETY_TENSORS).unlink()
    refused(run, f"missing {SAFETY_TENSORS}, {ADAPTER_CONFIG}")


def test_no_directory_is_said_to_be_none(tmp_path: Path) -> None:
    refused(tmp_path / "absent", "is not a directory")


@pytest.mark.parametrize("part", [p for p in PARTS if p != MANIFEST])
def test_altered_part_is_named(part: str, run: Path) -> None:
    content = bytearray((run / part).read_bytes())
    content[-2] ^= 1
    (run / part).write_bytes(content)
    refused(run, str(run / part), "was altered after training", "found ")


@pytest.mark.parametrize("part", [ADAPTER_TENSORS, SAFETY_TENSORS])
def test_truncated_part_is_named_even_if_the_manifest_agrees(part: str, run: Path) -> None:
    content = (run / part).read_bytes()
    (run / part).write_bytes(content[:-100])
    refused(run, str(run / part), "was altered")
    sign_again(run)
    refused(run, str(run / part), "is broken or truncated")


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_truncated_manifest_is_named(share: float, run: Path) -> None:
    content = (run / MANIFEST).read_bytes()
    (run / MANIFEST).write_bytes(content[: int(len(content) * share)])
    refused(run, str(run / MANIFEST), "cannot be read")


@pytest.mark.parametrize("content", [b"[]", b"null", b"\xff\xfe", b'{"format_version": 1}'])
def test_manifest_of_another_shape_is_named(content: bytes, run: Path) -> None:
    (run / MANIFEST).write_bytes(content)
    refused(run, str(run / MANIFEST), "cannot be read")


@pytest.mark.parametrize("version", [FORMAT_VERSION + 1, 0, None, "1"])
def test_another_format_version_is_named(version: object, run: Path) -> None:
    edit_manifest(run, format_version=version, some_future_field=1)
    refused(
        run, str(run / MANIFEST), f"expected format_version {FORMAT_VERSION}, found {version!r}"
    )


@pytest.mark.parametrize("part", [p for p in PARTS if p != MANIFEST])
def test_manifest_that_vouches_for_fewer_parts_is_refused(part: str, run: Path) -> None:
    """Otherwise a part could be exchanged by leaving its hash out."""
    hashes = {n: file_sha256(run / n) for n in PARTS if n not in (MANIFEST, part)}
    edit_manifest(run, sha256=hashes)
    refused(run, str(run / MANIFEST), "expected sha256 of every part")


def test_unknown_field_of_the_manifest_is_named(run: Path) -> None:
    edit_manifest(run, surprise=1)
    refused(run, str(run / MANIFEST), "surprise")


# -- parts that do not belong together --------------------------------------------------------


def test_another_base_is_refused(run: Path, saved: SavedRun, tmp_path: Path) -> None:
    base = Path(shutil.copytree(saved.base, tmp_path / "base"))
    edit_manifest(run, base_model=str(base))
    assert load_run(run).source.path == base
    with (base / "tokenizer_config.json").open("a", encoding="utf-8") as stream:
        stream.write("\n")
    refused(run, "was trained on", "use the original files")


def test_another_protocol_is_refused(run: Path) -> None:
    edit_manifest(run, protocol_hash="0" * 64)
    refused(run, "another verdict protocol", "000000000000")


Edit = Callable[[dict[str, Tensor]], dict[str, Tensor]]


@pytest.mark.parametrize(
    "edit",
    [
        lambda t: {k: v for k, v in t.items() if k != "safe_generators"},
        lambda t: {k: v for k, v in t.items() if k != "verdict_input_rows"},
        lambda t: {**t, "extra": torch.zeros(1)},
        lambda t: {**t, "verdict_rows": t["verdict_rows"][:2].clone()},
        lambda t: {**t, "command_generators": t["command_generators"][:1].clone()},
    ],
)
def test_safety_tensors_that_do_not_fit_are_refused(edit: Edit, run: Path) -> None:
    save_file(edit(load_file(run / SAFETY_TENSORS)), run / SAFETY_TENSORS)
    sign_again(run)
    refused(run, str(run / SAFETY_TENSORS), "expected tensors", "found")


def renamed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key.replace("layers.1.", "layers.9."): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("edit", "problem"),
    [
        (lambda t: {k: v for k, v in t.items() if "q_proj" not in k}, "4 tensors missing"),
        (renamed, "unexpected"),
    ],
)
def test_adapter_that_does_not_fit_is_refused(edit: Edit, problem: str, run: Path) -> None:
    save_file(edit(load_file(run / ADAPTER_TENSORS)), run / ADAPTER_TENSORS)
    sign_again(run)
    refused(run, str(run / ADAPTER_TENSORS), "does not fit the base model", problem)


def test_adapter_of_another_rank_is_refused(run: Path) -> None:
    tensors = load_file(run / ADAPTER_TENSORS)
    doubled = {k: torch.cat([v, v], dim=int("lora_B" in k)) for k, v in tensors.items()}
    save_file(doubled, run / ADAPTER_TENSORS)
    sign_again(run)
    refused(run, str(run / ADAPTER_TENSORS), "does not fit the base model")


# -- plain PEFT -------------------------------------------------------------------------------


def plain_peft(base: Path, run: Path) -> nn.Module:
    stock = transformers.AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32)
    model: nn.Module = peft.PeftModel.from_pretrained(stock, str(run)).eval()
    return model


def test_lora_part_loads_in_plain_peft(saved: SavedRun) -> None:
    model = plain_peft(saved.base, saved.directory)
    live = {n: p for n, p in saved.model.causal_lm.named_parameters() if "lora_" in n}
    loaded = {n: p for n, p in model.named_parameters() if "lora_" in n}
    assert loaded.keys() == live.keys()
    assert len(loaded) == 2 * 2 * 7
    assert all(torch.equal(loaded[name], live[name]) for name in live)


def test_plain_peft_has_lost_the_gates_and_ours_has_not(saved: SavedRun) -> None:
    """Why loading must go through load_run: plain PEFT answers, but as another model."""
    loaded = load_run(saved.directory).model
    packed = pack([PackedSequence((), TOKENS, 0, (0,) * len(TOKENS))], CPU)
    with torch.no_grad():
        ours = loaded.vocabulary_logits(loaded.hidden(packed)[0])[:, : loaded.vocab_size]
        plain = plain_peft(saved.base, saved.directory)(torch.tensor([TOKENS])).logits[0]
        for gate in loaded.gates:
            gate.safe_generators.zero_()
            gate.command_generators.zero_()
        ungated = loaded.vocabulary_logits(loaded.hidden(packed)[0])[:, : loaded.vocab_size]
    torch.testing.assert_close(ungated, plain, rtol=1e-4, atol=1e-4)
    assert float((ours - plain).abs().max()) > 0.1


# -- saving -----------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1000, 30_000])
def test_full_disk_leaves_no_run_that_looks_finished(
    limit: int, saved: SavedRun, tmp_path: Path
) -> None:
    target = tmp_path / "full"
    target.mkdir()
    with files_limited_to(limit), pytest.raises(DiskError, match="cannot write"):
        save_run(
            target,
            saved.model,
            saved.tokenizer,
            resolve_base(str(saved.base)),
            saved.config,
            {},
        )
    assert not (target / MANIFEST).exists()
    assert not list(target.glob(".*.tmp"))
    refused(target, f"missing {MANIFEST}")

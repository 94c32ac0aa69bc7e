"""Checkpoints: whole or absent, verified, the newest good one wins, a full disk costs nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.file_limit import files_limited_to
from torch import nn

from so8t_eval.errors import ConfigError, DiskError, ModelFileError
from so8t_train.checkpoint import (
    Checkpoint,
    checkpoint_directories,
    load_checkpoint,
    newest_checkpoint,
    optimizer_tensors,
    restore_optimizer,
    save_checkpoint,
)
from so8t_train.random_state import RandomState


def checkpoint(step: int, size: int = 5) -> Checkpoint:
    generator = torch.Generator().manual_seed(step)
    return Checkpoint(
        step=step,
        config_hash="hash",
        parameters={"a.weight": torch.randn(size, size, generator=generator)},
        optimizer={"a.weight/step": torch.tensor(float(step)), "a.weight/exp_avg": torch.ones(5)},
        reference={"safe": torch.zeros(2, 3, 28), "command": torch.ones(2, 3, 28)},
        random=RandomState(torch.get_rng_state(), {"0": torch.arange(16, dtype=torch.uint8)}),
        first_loss=1.5,
        session="cafe0123",
    )


def steps(directory: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in checkpoint_directories(directory)]


RNG = torch.get_rng_state()


def never(text: str) -> None:
    raise AssertionError(f"unexpected warning: {text}")


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_everything_comes_back_as_saved(tmp_path: Path) -> None:
    saved = checkpoint(7)
    loaded = load_checkpoint(save_checkpoint(tmp_path, saved, keep=2))
    assert (loaded.step, loaded.config_hash) == (7, "hash")
    for group in ("parameters", "optimizer", "reference"):
        before, after = getattr(saved, group), getattr(loaded, group)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    assert torch.equal(loaded.random.cpu, saved.random.cpu)
    assert torch.equal(loaded.random.cuda["0"], saved.random.cuda["0"])
    assert (loaded.first_loss, loaded.session, loaded.emergency) == (1.5, "cafe0123", False)


def test_a_checkpoint_of_format_1_is_read(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(7)._replace(random=RandomState(RNG, {})), keep=2)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    first = {key: state[key] for key in ("step", "config_hash", "sha256")}
    (path / "state.json").write_text(json.dumps(first, indent=1), encoding="utf-8")
    loaded = load_checkpoint(path)
    assert (loaded.step, loaded.config_hash, loaded.first_loss) == (7, "hash", None)
    assert torch.equal(loaded.random.cpu, RNG)


def test_a_format_of_the_future_is_refused_and_nothing_older_taken(tmp_path: Path) -> None:
    import so8t_train.checkpoint as module

    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "FORMAT_VERSION", 9)
        save_checkpoint(tmp_path, checkpoint(2), keep=2)
    with pytest.raises(ConfigError, match=r"expected format_version 2 or 1, found 9; resume with"):
        newest_checkpoint(tmp_path, never)


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert steps(tmp_path) == [3, 4]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003", "step-000004"]


def test_order_is_by_number_also_beyond_six_digits(tmp_path: Path) -> None:
    for step in (999_999, 1_000_000):
        save_checkpoint(tmp_path, checkpoint(step), keep=5)
    assert steps(tmp_path) == [999_999, 1_000_000]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(3), keep=2)
    changed = checkpoint(3)._replace(config_hash="new")
    assert load_checkpoint(save_checkpoint(tmp_path, changed, keep=2)).config_hash == "new"
    assert steps(tmp_path) == [3]


def test_no_directory_and_empty_directory_have_no_checkpoint(tmp_path: Path) -> None:
    assert newest_checkpoint(tmp_path / "absent", never) is None
    assert newest_checkpoint(tmp_path, never) is None


def test_an_unfinished_one_is_no_checkpoint_and_is_cleared_by_the_next(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    leftover = tmp_path / ".step-000002.tmp"
    shutil.copytree(tmp_path / "step-000001", leftover)
    torn = tmp_path / "step-000009"  # no state.json: written by something that died
    torn.mkdir()
    assert steps(tmp_path) == [1]
    save_checkpoint(tmp_path, checkpoint(2), keep=2)
    assert not leftover.exists()
    assert not torn.exists()
    newest = newest_checkpoint(tmp_path, never)
    assert newest is not None
    assert newest.step == 2


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("state.safetensors", flip_a_byte),
        ("state.safetensors", Path.unlink),
        ("state.safetensors", lambda path: path.write_bytes(b"")),
        ("state.json", Path.unlink),
        ("state.json", lambda path: path.write_bytes(path.read_bytes()[:20])),
        ("state.json", lambda path: path.write_text(path.read_text().replace("hash", "hush", 1))),
    ],
)
def test_altered_file_is_detected_and_the_older_checkpoint_used(
    file: str, damage: Callable[[Path], object], tmp_path: Path
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    damage(tmp_path / "step-000002" / file)
    warnings: list[str] = []
    newest = newest_checkpoint(tmp_path, warnings.append)
    if (tmp_path / "step-000002" / "state.json").exists():  # without it: not a complete one
        (warning,) = warnings
        assert "warning: damaged checkpoint passed over:" in warning
        assert str(tmp_path / "step-000002") in warning
    assert newest is not None
    assert newest.step == 1
    assert torch.equal(newest.parameters["a.weight"], checkpoint(1).parameters["a.weight"])


def test_altered_tensors_are_named_with_both_hashes(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(4), keep=1)
    flip_a_byte(path / "state.safetensors")
    with pytest.raises(ModelFileError, match=r"has changed since it was saved .* found .*delete"):
        load_checkpoint(path)


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"sha256": 1}', "not json", '{"step": null}'])
def test_broken_state_is_an_error_of_ours(text: str, tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, checkpoint(4), keep=1)
    state = json.loads((path / "state.json").read_text(encoding="utf-8"))
    if text == '{"step": null}':
        text = json.dumps({**state, "step": None})
    (path / "state.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match=str(path)):
        load_checkpoint(path)


def test_when_none_can_be_read_the_newest_problem_is_reported(tmp_path: Path) -> None:
    for step in (1, 2):
        flip_a_byte(save_checkpoint(tmp_path, checkpoint(step), keep=2) / "state.safetensors")
    warnings: list[str] = []
    with pytest.raises(ModelFileError, match="step-000002"):
        newest_checkpoint(tmp_path, warnings.append)
    assert len(warnings) == 2
    assert newest_checkpoint(tmp_path, warnings.append, required=False) is None


def test_a_damaged_later_checkpoint_does_not_push_out_good_ones(tmp_path: Path) -> None:
    """Resumed from step 2 because step 4 is damaged, and interrupted again at step 3."""
    for step in (2, 4):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    flip_a_byte(tmp_path / "step-000004" / "state.safetensors")
    save_checkpoint(tmp_path, checkpoint(3), keep=1)
    newest = newest_checkpoint(tmp_path, never)
    assert newest is not None
    assert newest.step == 3
    assert steps(tmp_path) == [3]


def test_full_disk_is_reported_and_leaves_the_older_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, checkpoint(1), keep=1)
    with (
        files_limited_to(64 * 1024),
        pytest.raises(DiskError, match=r"cannot write the checkpoint .*step-000002"),
    ):
        save_checkpoint(tmp_path, checkpoint(2, size=300), keep=1)
    assert [p.name for p in tmp_path.iterdir()] == ["step-000001"]
    newest = newest_checkpoint(tmp_path, never)
    assert newest is not None
    assert newest.step == 1
    save_checkpoint(tmp_path, checkpoint(2, size=300), keep=1)
    assert steps(tmp_path) == [2]


def test_a_directory_that_cannot_be_made_is_a_disk_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(DiskError, match="cannot write the checkpoint"):
        save_checkpoint(tmp_path / "file", checkpoint(1), keep=1)


def test_optimizer_goes_on_exactly_after_a_round_trip() -> None:
    def trained(layer: nn.Linear, optimizer: torch.optim.Optimizer, n: int) -> None:
        for i in range(n):
            optimizer.zero_grad()
            layer(torch.full((1, 3), float(i + 1))).square().sum().backward()
            optimizer.step()

    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1)
    trained(layer, optimizer, 3)
    names = {parameter: name for name, parameter in layer.named_parameters()}
    saved = optimizer_tensors(optimizer, names)
    assert set(saved) == {
        f"{name}/{key}" for name in ("weight", "bias") for key in ("step", "exp_avg", "exp_avg_sq")
    }
    twin = nn.Linear(3, 2)
    twin.load_state_dict(layer.state_dict())
    resumed = torch.optim.AdamW(twin.parameters(), lr=0.1)
    restore_optimizer(resumed, {p: n for n, p in twin.named_parameters()}, saved)
    trained(layer, optimizer, 2)
    trained(twin, resumed, 2)
    assert torch.equal(layer.weight, twin.weight)
    assert torch.equal(layer.bias, twin.bias)

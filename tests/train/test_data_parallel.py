"""Several processes of one fit: the same steps as one process makes, and one voice."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.tiny_fit import QUIET, fit_config

from so8t_eval.errors import ConfigError
from so8t_train.checkpoint import checkpoint_directories, load_checkpoint
from so8t_train.config import FitConfig
from so8t_train.data_parallel import ALONE, DataParallel, join_processes
from so8t_train.fit import TRAIN_LOG, fit
from so8t_train.run_dir import ADAPTER_TENSORS, SAFETY_TENSORS, read_manifest
from so8t_train.trainer import CHECKPOINTS

pytestmark = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated")

ROOT = Path(__file__).parents[2]
STEPS = 6
SETTINGS = {
    "micro_batch_size": 1,
    "max_length": 96,  # passes of one or two cases
    "rotation_init_std": 0.2,
    "category_loss_weight": 0.3,
    "adapter_dtype": "float32",
    "max_steps": STEPS,
    "num_epochs": 5,
    "save_every_steps": 2,
    "eval_every_steps": 2,
}
TOGETHER, ALONE_AS_MUCH = {"gradient_accumulation_steps": 3}, {"gradient_accumulation_steps": 6}
FAILING = """
import os, sys
from so8t_train import trainer
from so8t_train.cli import main
learn, passes = trainer.task_loss, [0]
def task_loss(*arguments):
    passes[0] += 1
    if os.environ["RANK"] == "1" and passes[0] > 4:
        raise ZeroDivisionError("a bug")
    return learn(*arguments)
trainer.task_loss = task_loss
main(sys.argv[1:])
"""


def launched(config: FitConfig, *arguments: str, script: Path | None = None) -> list[str]:
    """The command that trains ``config`` in two processes."""
    file = config.output_dir.parent / "fit.yaml"
    file.write_text(yaml.safe_dump(config.model_dump(mode="json")), encoding="utf-8")
    what = ["-m", "so8t_train.cli"] if script is None else [str(script)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    return [sys.executable, *launcher, *what, "fit", str(file), *arguments]


def started(command: list[str]) -> "subprocess.Popen[str]":
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=ROOT,
    )


def finished(command: list[str]) -> tuple[int, str, str]:
    process = started(command)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def log(config: FitConfig) -> list[dict[str, object]]:
    lines = (config.output_dir / TRAIN_LOG).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def weight_bytes(config: FitConfig) -> list[bytes]:
    return [(config.output_dir / name).read_bytes() for name in (ADAPTER_TENSORS, SAFETY_TENSORS)]


@pytest.fixture(scope="module")
def dropout_pair(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> FitConfig:
    """A finished fit of two processes with dropout, never interrupted."""
    directory = tmp_path_factory.mktemp("pair")
    config = fit_config(directory, tiny_llama, **SETTINGS, **TOGETHER, lora_dropout=0.3)
    code, _, err = finished(launched(config))
    assert code == 0, err
    return config


@pytest.mark.slow
def test_two_processes_make_the_steps_of_one(tiny_llama: Path, tmp_path: Path) -> None:
    one = fit_config(tmp_path / "one", tiny_llama, **SETTINGS, **ALONE_AS_MUCH)
    two = fit_config(tmp_path / "two", tiny_llama, **SETTINGS, **TOGETHER)
    two = two.model_copy(update={"train_file": one.train_file, "dev_file": one.dev_file})
    fit(one, resume=False, reporter=QUIET)
    code, out, err = finished(launched(two))
    assert code == 0, err

    expected, found = log(one), log(two)
    assert [line["step"] for line in found] == list(range(1, STEPS + 1))
    for a, b in zip(expected, found, strict=True):
        assert b.keys() == a.keys()
        for key in a.keys() - {"step_s", "session", "dev"}:
            assert b[key] == pytest.approx(a[key], rel=1e-4, abs=1e-6), key
    assert [line["step"] for line in found if line["dev"]] == [2, 4]
    for name in (ADAPTER_TENSORS, SAFETY_TENSORS):
        theirs, ours = load_file(one.output_dir / name), load_file(two.output_dir / name)
        assert theirs.keys() == ours.keys()
        for key, tensor in theirs.items():
            torch.testing.assert_close(ours[key], tensor, rtol=1e-3, atol=1e-4)

    single, pair = read_manifest(one.output_dir), read_manifest(two.output_dir)
    assert pair.training["processes"] == 2
    assert pair.training["cases_per_step"] == single.training["cases_per_step"] == 6
    assert pair.temperature == pytest.approx(single.temperature, rel=1e-3)
    hashes = {
        load_checkpoint(path).config_hash
        for config in (one, two)
        for path in checkpoint_directories(config.output_dir / CHECKPOINTS)
    }
    assert len(hashes) == 1
    assert out.count("run directory:") == 1
    for once in ("loading ", f"step 1/{STEPS} ", "step 2: dev", "calibrating on the dev split"):
        assert err.count(once) == 1, once


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_stop_of_one_process_stops_both_and_resuming_is_bit_identical(
    rank: int, dropout_pair: FitConfig, tmp_path: Path
) -> None:
    config = dropout_pair.model_copy(update={"output_dir": tmp_path / "run"})
    process = started(launched(config))
    path = config.output_dir / TRAIN_LOG
    deadline = time.monotonic() + 120
    while not (path.is_file() and path.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.kill(process_of_rank(process.pid, rank), signal.SIGTERM)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0
    assert err.count("stopped after step") == 1, err
    (last,) = {line["step"] for line in log(config)[-1:]}
    newest = checkpoint_directories(config.output_dir / CHECKPOINTS)[-1]
    assert load_checkpoint(newest).step == last < STEPS
    assert not load_checkpoint(newest).emergency

    with pytest.raises(ConfigError, match=r"trained by 2 processes, found 1; .* without lora_drop"):
        fit(alone(config), resume=True, reporter=QUIET)
    code, _, err = finished(launched(config, "--resume"))
    assert code == 0, err
    assert weight_bytes(config) == weight_bytes(dropout_pair)


def alone(config: FitConfig) -> FitConfig:
    return config.model_copy(update=ALONE_AS_MUCH)


def process_of_rank(launcher: int, rank: int) -> int:
    """Process id of a rank, by the environment that its launcher gave it."""
    import psutil

    workers = psutil.Process(launcher).children(recursive=True)
    (found,) = (p.pid for p in workers if p.environ().get("RANK") == str(rank))
    return found


@pytest.mark.slow
def test_failure_of_one_process_ends_both_and_keeps_the_last_whole_step(
    tiny_llama: Path, tmp_path: Path
) -> None:
    config = fit_config(tmp_path, tiny_llama, **SETTINGS, **TOGETHER)
    config = config.model_copy(update={"save_every_steps": 100})
    script = tmp_path / "failing.py"
    script.write_text(FAILING, encoding="utf-8")
    code, _, err = finished(launched(config, script=script))
    assert code != 0
    assert "process 1 of 2 failed: a bug" in err
    assert err.count("emergency checkpoint") == 1
    (path,) = checkpoint_directories(config.output_dir / CHECKPOINTS)
    saved = load_checkpoint(path)
    assert (saved.step, saved.processes, saved.emergency) == (log(config)[-1]["step"], 2, True)

    # Without dropout nothing is drawn, so one process may go on where the steps are the same.
    with pytest.raises(ConfigError, match=r"trained by 2 processes, found 1; .* x processes as it"):
        fit(config, resume=True, reporter=QUIET)
    assert fit(alone(config), resume=True, reporter=QUIET).steps == STEPS


# -- without other processes ------------------------------------------------------------------


@given(costs=st.lists(st.integers(1, 512), max_size=20), processes=st.integers(1, 5))
def test_every_pass_is_of_one_process_and_none_has_much_more(
    costs: list[int], processes: int
) -> None:
    shares = [DataParallel(processes, rank).share(costs) for rank in range(processes)]
    assert all(sum(owners) == 1 for owners in zip(*shares, strict=True))
    loads = [sum(c for c, own in zip(costs, share, strict=True) if own) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


def test_one_process_computes_everything_itself() -> None:
    assert ALONE.share([3, 1]) == [True, True]
    assert ALONE.together(lambda: [1, 2.5]) == [1, 2.5]
    before = torch.get_rng_state()
    ALONE.seed_step(0, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_processes_of_a_step_draw_differently_and_again_the_same() -> None:
    def drawn(rank: int, step: int) -> float:
        with torch.random.fork_rng():
            DataParallel(2, rank).seed_step(7, step)
            return float(torch.rand(1))

    assert len({drawn(rank, step) for rank in (0, 1) for step in (0, 1)}) == 4
    assert drawn(1, 1) == drawn(1, 1)


@pytest.mark.parametrize(
    ("variable", "eight_bit", "says"),
    [
        (
            "ACCELERATE_USE_FSDP",
            True,
            r"FSDP .*: the integer codes and the scales of a quantized base",
        ),
        ("ACCELERATE_USE_FSDP", False, r"FSDP .*: training adds gradients of whole copies"),
        ("ACCELERATE_USE_DEEPSPEED", True, r"DeepSpeed .*: the integer codes"),
    ],
)
def test_launch_that_shards_the_model_is_refused(
    variable: str, eight_bit: bool, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "true")
    with pytest.raises(ConfigError, match=says):
        join_processes(fit_config(tmp_path, "base", load_in_8bit=eight_bit))


def test_launch_that_starts_one_process_for_several_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What ``accelerate launch --num_processes 2`` leaves in the environment without a GPU."""
    monkeypatch.setenv("ACCELERATE_DYNAMO_MODE", "default")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    with pytest.raises(ConfigError, match="asked for several processes and has started one"):
        join_processes(fit_config(tmp_path, "base"))

"""The model card says what a run recorded, in the form that fit records it, and nothing else."""

import json
from pathlib import Path

import pytest
import yaml
from support.case_files import write_cases

from so8t_eval.errors import ModelFileError
from so8t_eval.intervals import format_interval, wilson
from so8t_train.base_model import EMBEDDED
from so8t_train.config import FitConfig
from so8t_train.dev_evaluation import DevResult
from so8t_train.memory_log import MemoryUse
from so8t_train.memory_phases import MEMORY_PHASES, MemoryPhases, write_phases
from so8t_train.model_card import CARD, render_model_card, write_model_card
from so8t_train.model_card_facts import UNKNOWN
from so8t_train.run_dir import RunManifest
from so8t_train.trainer import StepReport

MEMORY_GIB = (1.5, 4.0, 4.5)


def case(number: int, verdict: str, lang: str = "en") -> dict[str, object]:
    return {
        "id": f"case-{number}",
        "prompt": f"request number {number}",
        "verdict": verdict,
        "category": {"allow": "ok/office", "escalate": "esc/advice", "refuse": "ref/cyber"}[
            verdict
        ],
        "lang": lang,
    }


@pytest.fixture
def run_directory(tmp_path: Path) -> Path:
    """A finished run's records, written with the types that fit writes them with."""
    train, dev = tmp_path / "data" / "train.jsonl", tmp_path / "data" / "dev.jsonl"
    train.parent.mkdir()
    write_cases(train, [case(0, "allow"), case(1, "refuse", "ja"), case(2, "escalate")])
    write_cases(
        dev, [case(i, verdict) for i, verdict in enumerate(["refuse"] * 20 + ["allow"] * 10)]
    )
    config = FitConfig(
        base_model=EMBEDDED,
        train_file=(train,),
        dev_file=(dev,),
        output_dir=tmp_path / "run",
        seed=7,
    )
    result = DevResult(30, 0.9, 0.31, 0.95, 0.05, 0.0)
    manifest = RunManifest(
        format_version=1,
        protocol_hash="ab" * 32,
        base_model=EMBEDDED,
        base_sha256="cd" * 32,
        temperature=1.25,
        sha256={},
        config=config,
        versions={"torch": "2.13.0"},
        platform="Linux x86_64, Python 3.11.2",
        training={
            "steps": 3,
            "cases": 3,
            "cases_per_step": 8,
            "seconds": 600.0,
            "resumed": True,
            "device": "cpu",
            "compute_dtype": "float32",
            "threads": 2,
            "trainable_parameters": 4_916_736,
            "dev": result._asdict(),
        },
    )
    directory = config.output_dir
    directory.mkdir()
    (directory / "so8t.json").write_text(manifest.model_dump_json(), encoding="utf-8")
    steps = [step_report(i, commutator=0.01 * i)._asdict() for i in range(3)]
    memory = [
        {"step": i, **MemoryUse(gib, gib, gib, "rss")._asdict(), "effective_batch_size": 8}
        for i, gib in enumerate(MEMORY_GIB)
    ]
    for name, lines in (("train_log.jsonl", steps), ("memory.jsonl", memory)):
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def step_report(step: int, commutator: float) -> StepReport:
    return StepReport(
        step=step,
        total_steps=3,
        epoch=0.5,
        loss=1.0,
        safety_loss=0.9,
        task_loss=None,
        category_loss=None,
        pet_temporal=0.1,
        pet_inertia=0.0,
        verdict_accuracy=0.5,
        grad_norm=1.0,
        learning_rate=1e-4,
        commutator=commutator,
        tokens=100,
        step_s=1.0,
        dev=None,
    )


def front_matter(card: str) -> dict[str, object]:
    _, header, _ = card.split("---\n", maxsplit=2)
    value = yaml.safe_load(header)
    assert isinstance(value, dict)
    return value


def edit_manifest(directory: Path, **changes: object) -> None:
    path = directory / "so8t.json"
    manifest = json.loads(path.read_text(encoding="utf-8")) | changes
    path.write_text(json.dumps(manifest), encoding="utf-8")


def test_front_matter_is_what_the_hub_reads(run_directory: Path) -> None:
    meta = front_matter(render_model_card(run_directory))
    assert meta["license"] == "apache-2.0"
    assert meta["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert meta["library_name"] == "peft"
    assert meta["language"] == ["en", "ja"]
    assert "so8t" in meta["tags"]  # type: ignore[operator]


def test_measured_memory_is_start_median_peak_and_batch(run_directory: Path) -> None:
    card = render_model_card(run_directory)
    assert "| After the first step | 1.50 GiB |" in card
    assert "| Median | 4.00 GiB |" in card
    assert "| Peak | 4.50 GiB |" in card
    assert "| Effective batch size | 8 |" in card
    assert "rss: resident memory" in card


def test_memory_by_phase_is_predicted_beside_measured(run_directory: Path) -> None:
    assert "as measured:" not in render_model_card(run_directory)
    predicted = {"load": 1.02, "train": 3.55, "save": 3.24}
    write_phases(run_directory, MemoryPhases("rss", predicted, {"load": 1.19, "train": 3.73}))
    card = render_model_card(run_directory)
    assert "| load | 1.02 GiB | 1.19 GiB |" in card
    assert "| train | 3.55 GiB | 3.73 GiB |" in card
    assert f"| save | 3.24 GiB | {UNKNOWN} |" in card


@pytest.mark.parametrize("text", ["", "[]", '{"kind": "rss", "predicted": {"load": null}}'])
def test_a_torn_record_of_phases_is_left_out(run_directory: Path, text: str) -> None:
    (run_directory / MEMORY_PHASES).write_text(text, encoding="utf-8")
    assert "as measured:" not in render_model_card(run_directory)


def test_dev_rates_have_the_wilson_interval_of_their_own_denominator(run_directory: Path) -> None:
    card = render_model_card(run_directory)
    assert f"| Accuracy | {format_interval(wilson(27, 30))} |" in card
    assert f"| Refuse recall | {format_interval(wilson(19, 20))} |" in card
    assert f"| Unsafe allow | {format_interval(wilson(1, 20))} |" in card
    assert f"| Over-refusal | {format_interval(wilson(0, 10))} |" in card


def test_no_interval_is_claimed_when_the_dev_file_has_changed(run_directory: Path) -> None:
    dev = run_directory.parent / "data" / "dev.jsonl"
    write_cases(dev, [case(0, "refuse")])
    card = render_model_card(run_directory)
    assert "| Refuse recall | 0.950 (no interval: denominator not recorded) |" in card
    assert f"| Accuracy | {format_interval(wilson(27, 30))} |" in card


def test_training_facts_and_last_commutator_are_shown(run_directory: Path) -> None:
    card = render_model_card(run_directory)
    assert "| Final commutator, rms of ‖R_cmd R_safe − R_safe R_cmd‖_F | 0.02 |" in card
    assert "| Trainable parameters | 4,916,736 |" in card
    assert "| Time | 10 min |" in card
    assert "| Compute dtype | float32 |" in card  # where the configuration says auto
    assert "| train | `train.jsonl` | 3 (1 / 1 / 1) |" in card
    assert "| Resumed | yes; the time is that of all its sessions |" in card


def test_reproduction_settings_are_a_valid_configuration(run_directory: Path) -> None:
    card = render_model_card(run_directory)
    block = card.split("```yaml\n")[1].split("\n```")[0]
    config = FitConfig.model_validate(yaml.safe_load(block))
    assert config.seed == 7
    assert config.train_file == (Path("train.jsonl"),)
    assert "so8t-train fit fit.yaml" in card


def test_card_warns_that_plain_peft_drops_the_safety_head(run_directory: Path) -> None:
    card = render_model_card(run_directory)
    assert "**Plain PEFT is not enough.**" in card
    assert "Must not be used" in card


def test_directories_of_the_training_machine_do_not_leak(run_directory: Path) -> None:
    edit_manifest(run_directory, base_model=str(run_directory.parent / "my-base"))
    card = render_model_card(run_directory)
    assert str(run_directory.parent) not in card
    assert "`my-base`" in card
    assert front_matter(card)["license"] == "other"


def test_absent_figures_are_called_so(tmp_path: Path) -> None:
    (tmp_path / "so8t.json").write_text("{}", encoding="utf-8")
    (tmp_path / "train_log.jsonl").write_text('{"step": 1}\nnot json\n[1]\n', encoding="utf-8")
    write_model_card(tmp_path)
    card = (tmp_path / CARD).read_text(encoding="utf-8")
    assert f"| Time | {UNKNOWN} |" in card
    assert "No dev cases were given." in card
    assert f"rms of ‖R_cmd R_safe − R_safe R_cmd‖_F | {UNKNOWN} |" in card
    assert front_matter(card)["license"] == "other"


@pytest.mark.parametrize("text", ["", "[1]", "{"])
def test_a_broken_manifest_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "so8t.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"so8t\.json"):
        write_model_card(tmp_path)
    assert not (tmp_path / CARD).exists()

"""``so8t-train plan`` on tiny models: figures, JSON, exit codes, suggestions, time."""

import json
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result
from support.case_files import write_cases
from support.tiny_fit import fit_config, training_cases
from support.tiny_hf import make_tiny_model

from so8t_train import fit_plan
from so8t_train.base_model import EMBEDDED
from so8t_train.cli import main
from so8t_train.fit_plan import PREDICTION_ERROR, FitPlan, plan_fit
from so8t_train.model_shape import locate_base, read_shape
from so8t_train.time_plan import measured_time, rough_time


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model deep enough for checkpointing to pay."""
    return make_tiny_model(tmp_path_factory.mktemp("base") / "llama", layers=8)


@pytest.fixture
def settings(base: Path, tmp_path: Path) -> Path:
    """A configuration file of a fit whose micro-batches are too long to be joined."""
    config = fit_config(
        tmp_path,
        base,
        train_file=write_cases(tmp_path / "all.jsonl", training_cases(24)),
        micro_batch_size=8,
        max_length=64,
    )
    values = config.model_dump(mode="json", exclude_none=True)
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def invoke(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["plan", *map(str, arguments)], prog_name="so8t-train")


def planned(settings: Path, **changes: object) -> FitPlan:
    from so8t_train.config import load_config

    return plan_fit(load_config(settings).model_copy(update=changes))


def test_json_has_every_part_and_adds_up(settings: Path) -> None:
    result = invoke(settings, "--json")
    assert result.exit_code == 0
    facts = json.loads(result.stdout)
    assert facts["peak"] == max(sum(parts.values()) for parts in facts["phases"].values())
    assert facts["phases"]["train"]["interpreter and imports"] == facts["imports"]
    assert facts["largest_pass"]["cases"] == 8
    assert facts["fit"] == "fits"
    assert not facts["time"]["measured"]


def test_the_text_names_peak_time_and_other_settings(settings: Path) -> None:
    result = invoke(settings)
    assert result.exit_code == 0
    for expected in ("activations", "available: fits", "rough", "gradient_checkpointing: true"):
        assert expected in result.stdout


@pytest.mark.parametrize(("share", "code"), [(1 + 1.1 * PREDICTION_ERROR, 0), (1.05, 4), (0.95, 2)])
def test_exit_code_says_whether_it_fits(
    settings: Path, monkeypatch: pytest.MonkeyPatch, share: float, code: int
) -> None:
    # The share of imports is that of this very process: pinned, so that both plans have the same.
    monkeypatch.setattr(fit_plan, "imported_bytes", lambda: 400 << 20)
    needed = planned(settings, load_in_8bit=False).memory.peak
    monkeypatch.setattr(fit_plan, "available_bytes", lambda _device: int(needed * share))
    assert invoke(settings).exit_code == code


def test_each_suggestion_lowers_the_peak_and_all_together_most(settings: Path) -> None:
    plan = planned(settings)
    changed = [tuple(suggestion.changes) for suggestion in plan.suggestions]
    assert ("gradient_checkpointing",) in changed
    assert ("micro_batch_size", "gradient_accumulation_steps") in changed
    peaks = [suggestion.peak for suggestion in plan.suggestions]
    assert all(peak < plan.memory.peak for peak in peaks)
    assert peaks[-1] == min(peaks)
    again = next(s for s in plan.suggestions if tuple(s.changes) == ("gradient_checkpointing",))
    assert planned(settings, **again.changes).work == again.work
    assert again.work.flops > plan.work.flops


def test_time_is_measured_when_asked(settings: Path) -> None:
    plan = planned(settings)
    measured, rough = measured_time(plan), rough_time(plan)
    assert measured.measured
    assert measured.basis.startswith("measured")
    assert measured.seconds_per_epoch > 0
    assert rough.seconds == pytest.approx(rough.seconds_per_epoch * plan.epochs)
    assert not plan.config.output_dir.exists()


def test_the_embedded_base_is_read_from_its_header() -> None:
    shape = read_shape(locate_base(EMBEDDED))
    assert shape.parameters == 134_479_872
    assert (shape.layers, shape.hidden, shape.intermediate) == (30, 576, 1536)
    assert (shape.query_width, shape.key_width, shape.vocabulary) == (576, 192, 49152)
    assert shape.tied
    assert {linear.name for linear in shape.linears} >= {"q_proj", "down_proj"}


def test_a_directory_is_read_from_its_headers(untied_qwen: Path) -> None:
    shape = read_shape(locate_base(str(untied_qwen)))
    assert not shape.tied
    assert shape.layers == 2
    assert len(shape.linears) == 14


def test_a_broken_model_is_named(settings: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text("{", encoding="utf-8")
    (broken / "model.safetensors").write_bytes(b"none")
    values = yaml.safe_load(settings.read_text(encoding="utf-8")) | {"base_model": str(broken)}
    settings.write_text(yaml.safe_dump(values), encoding="utf-8")
    result = invoke(settings)
    assert result.exit_code == 3
    assert str(broken) in result.stderr

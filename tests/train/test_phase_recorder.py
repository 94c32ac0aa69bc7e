"""A fit records its memory by phase: measured as it goes, predicted as the plan predicts it."""

import sys
from pathlib import Path

import pytest
from support.tiny_fit import QUIET, build, fit_config
from support.tiny_hf import Family, make_tiny_model

from so8t_train import fit_plan, phase_recorder
from so8t_train.config import FitConfig
from so8t_train.fit import FitReporter, fit
from so8t_train.fit_plan import plan_fit
from so8t_train.memory_log import GIB
from so8t_train.memory_phases import MEMORY_PHASES, MemoryPhases, read_phases, write_phases
from so8t_train.model_card import CARD
from so8t_train.model_shape import loaded_shape, locate_base, read_shape
from so8t_train.phase_peaks import PhasePeaks
from so8t_train.trainer import StepReport

PHASES = ["load", "hold", "train", "save"]
MIB = 1 << 20


class KilledError(BaseException):
    """Stands for a process that ends inside a step's report."""


def recorded(config: FitConfig) -> MemoryPhases:
    phases = read_phases(config.output_dir)
    assert phases is not None
    return phases


def killed_after(config: FitConfig, step: int) -> None:
    def on_step(report: StepReport, _memory: float) -> None:
        if report.step == step:
            raise KilledError

    with pytest.raises(KilledError):
        fit(config, resume=False, reporter=FitReporter(QUIET.news, on_step))


def test_a_fit_records_every_phase_and_the_plans_prediction(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both measure this very process, at different moments.
    monkeypatch.setattr(fit_plan, "imported_bytes", lambda: 400 << 20)
    config = fit_config(tmp_path, tiny_llama, load_in_8bit=True)
    planned = {phase.name: phase.total / GIB for phase in plan_fit(config).memory.phases}
    fit(config, resume=False, reporter=QUIET)
    record = recorded(config)
    assert record.kind == "rss"
    assert list(record.measured) == PHASES
    assert all(0.05 < gib < 50 for gib in record.measured.values())
    assert record.predicted == pytest.approx(planned)
    card = (config.output_dir / CARD).read_text(encoding="utf-8")
    assert f"| train | {planned['train']:.2f} GiB | {record.measured['train']:.2f} GiB |" in card


def test_an_interrupted_fit_has_recorded_and_a_resumed_one_keeps_the_larger_peaks(
    tiny_llama: Path, tmp_path: Path
) -> None:
    config = fit_config(tmp_path, tiny_llama, save_every_steps=2)
    killed_after(config, 3)
    first = recorded(config)
    assert list(first.measured) == PHASES[:3]
    earlier = first._replace(measured={**first.measured, "load": 0.01, "train": 77.0})
    write_phases(config.output_dir, earlier)
    fit(config, resume=True, reporter=QUIET)
    record = recorded(config)
    assert list(record.measured) == PHASES
    assert record.measured["train"] == 77.0
    assert 0.01 < record.measured["load"] < 50


def test_a_fit_that_starts_anew_forgets_an_abandoned_record(
    tiny_llama: Path, tmp_path: Path
) -> None:
    config = fit_config(tmp_path, tiny_llama, max_steps=1)
    config.output_dir.mkdir()
    write_phases(config.output_dir, MemoryPhases("rss", {}, {"train": 77.0}))
    fit(config, resume=False, reporter=QUIET)
    assert recorded(config).measured["train"] < 50


def test_peaks_of_another_device_are_not_compared() -> None:
    now = MemoryPhases("cuda", {"train": 2.0}, {"load": 1.0})
    assert now.after(MemoryPhases("rss", {"train": 3.0}, {"load": 9.0, "train": 9.0})) == now
    same = now.after(MemoryPhases("cuda", {"train": 3.0}, {"load": 0.5, "train": 4.0}))
    assert same == MemoryPhases("cuda", {"train": 2.0}, {"load": 1.0, "train": 4.0})


def test_neither_a_failed_prediction_nor_a_failed_record_stops_a_fit(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise ArithmeticError("no such pass")

    monkeypatch.setattr(phase_recorder, "fit_passes", broken)
    config = fit_config(tmp_path, tiny_llama, max_steps=1)
    (config.output_dir / MEMORY_PHASES).mkdir(parents=True)  # cannot be replaced by a file
    news: list[str] = []
    assert fit(config, resume=False, reporter=FitReporter(news.append, QUIET.on_step)).steps == 1
    warnings = [line for line in news if line.startswith("warning: memory by phase")]
    assert "no such pass" in warnings[0]
    assert any(MEMORY_PHASES in line for line in warnings[1:])


@pytest.mark.skipif(sys.platform != "linux", reason="the high-water mark is Linux's")
def test_a_peak_that_is_over_before_the_phase_ends_is_seen_and_not_again() -> None:
    peaks = PhasePeaks("rss")
    block = bytearray(256 * MIB)  # mapped: given back at once
    block[::4096] = b"\1" * len(block[::4096])
    del block
    peaks.ends("load")
    peaks.ends("hold")
    assert peaks.measured["load"] - peaks.measured["hold"] > 200 * MIB / GIB


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"load_in_8bit": True}),
        ("llama", {"rotation_gates": False}),
        ("llama", {"load_in_4bit": True}),
        ("qwen3", {}),
        ("phi3", {"load_in_8bit": True}),
        ("gemma2", {}),
    ],
)
def test_the_loaded_model_has_the_shape_of_its_files(
    family: Family, changes: dict[str, object], tmp_path: Path
) -> None:
    base = make_tiny_model(tmp_path / "base", family, tied=family != "qwen3")
    model, _tokenizer = build(fit_config(tmp_path / "fit", base, **changes))
    source = locate_base(str(base))
    found, expected = loaded_shape(source, model.base), read_shape(source)
    assert sorted(found.linears) == sorted(expected.linears)
    assert found._replace(linears=()) == expected._replace(linears=())

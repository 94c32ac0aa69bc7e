"""The YAML configuration: defaults of the contract, and errors that name file and key."""

from pathlib import Path

import pytest
import yaml

from so8t_eval.errors import ConfigError
from so8t_train.config import FitConfig, load_config, parse_config

REQUIRED: dict[str, object] = {
    "base_model": "base.gguf",
    "train_file": "train.jsonl",
    "output_dir": "run",
}
CONTRACT_DEFAULTS = {
    "load_in_8bit": True,
    "lora_target_modules": "all-linear",
    "gradient_checkpointing": True,
    "micro_batch_size": 1,
    "gradient_accumulation_steps": 8,
    "learning_rate": 2e-4,
    "safety_learning_rate": 1e-4,
    "weight_decay": 0.0,
    "num_epochs": 2.0,
    "device_map": "auto",
    "trust_remote_code": False,
    "pet_phase_weights": (0.05, 0.2, 0.5),
    "pet_phase_starts": (0.3, 0.7),
    "merge_base": "original",
    "freeze": "none",
    "rotation_gates": True,
}
REFERENCE = Path(__file__).parents[2] / "so8t_train" / "reference" / "fit.yaml"


def write(path: Path, **changes: object) -> Path:
    path.write_text(yaml.safe_dump({**REQUIRED, **changes}), encoding="utf-8")
    return path


@pytest.mark.parametrize(("key", "value"), CONTRACT_DEFAULTS.items())
def test_defaults_are_those_of_the_contract(key: str, value: object) -> None:
    assert getattr(parse_config(REQUIRED, "test"), key) == value


def test_effective_batch_size_is_micro_batch_times_accumulation() -> None:
    assert parse_config(REQUIRED, "test").cases_per_step == 8
    changed = {**REQUIRED, "micro_batch_size": 3, "gradient_accumulation_steps": 5}
    assert parse_config(changed, "test").cases_per_step == 15


def test_every_key_is_documented_where_it_is_defined() -> None:
    source = (Path(__file__).parents[2] / "so8t_train" / "config.py").read_text(encoding="utf-8")
    lines = source.splitlines()
    for key in FitConfig.model_fields:
        (defined,) = [i for i, line in enumerate(lines) if line.startswith(f"    {key}: ")]
        assert lines[defined + 1].strip().startswith('"""'), key


def test_the_reference_configuration_loads_and_names_shipped_files() -> None:
    config = load_config(REFERENCE)
    assert config.base_model == "embedded:smollm2-135m-instruct"
    assert all(file.is_file() for file in (*config.train_file, *config.dev_file))


def test_unknown_key_is_an_error_with_the_nearest_key(tmp_path: Path) -> None:
    path = write(tmp_path / "fit.yaml", learning_rat=1e-3)
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value) == (
        f"{path}: learning_rat: unknown key; did you mean 'learning_rate'?"
    )


def test_unknown_key_unlike_any_other_points_to_the_documentation() -> None:
    with pytest.raises(ConfigError, match=r"zzz: unknown key; remove it or see docs/config\.md"):
        parse_config({**REQUIRED, "zzz": 1}, "fit.yaml")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("lora_r", 0),
        ("lora_r", "many"),
        ("lora_r", 2.5),
        ("lora_alpha", float("inf")),
        ("lora_dropout", 1.0),
        ("lora_target_modules", "q_proj"),
        ("learning_rate", 0),
        ("learning_rate", float("nan")),
        ("learning_rate", -1e-4),
        ("weight_decay", -0.1),
        ("micro_batch_size", 0),
        ("gradient_accumulation_steps", -1),
        ("num_epochs", 0),
        ("max_steps", 0),
        ("max_length", 8),
        ("label_smoothing", 0.5),
        ("class_weights", "sometimes"),
        ("class_weights", [1.0, 2.0]),
        ("class_weights", [1.0, 0.0, 1.0]),
        ("pet_phase_starts", [0.7, 0.3]),
        ("pet_phase_starts", [0.3, 0.3]),
        ("pet_phase_starts", [0.0, 0.5]),
        ("pet_phase_starts", [0.3, 1.5]),
        ("pet_phase_weights", [0.1, 0.2]),
        ("task_loss_share", 1.1),
        ("freeze", "task"),
        ("compute_dtype", "int8"),
        ("device_map", "tpu"),
        ("merge_base", "other"),
        ("warmup_ratio", 1.0),
        ("seed", -1),
        ("seed", 2**32),
        ("load_in_8bit", "perhaps"),
        ("format_version", 2),
        ("train_file", []),
        ("train_file", 3),
        ("output_dir", None),
    ],
)
def test_wrong_type_or_range_names_file_and_key(key: str, value: object, tmp_path: Path) -> None:
    path = write(tmp_path / "fit.yaml", **{key: value})
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.exit_code == 2
    assert all(line.startswith(f"{path}: {key}") for line in str(caught.value).splitlines())


@pytest.mark.parametrize("key", REQUIRED)
def test_missing_key_is_named(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^fit.yaml: {key}: missing; this field is required$"):
        parse_config({k: v for k, v in REQUIRED.items() if k != key}, "fit.yaml")


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**REQUIRED, "lora_r": 0, "seeds": 3}, "fit.yaml")
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("base_model: [unclosed", "not valid YAML"),
        ("- a\n- b\n", "expected 'key: value' lines, found list"),
        ("", "expected 'key: value' lines, found none"),
        ("!!python/object/apply:os.getcwd []", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "key 'seed' is given twice"),
        ("1: 2\n", "1: "),
    ],
)
def test_broken_file_is_named_with_the_problem(text: str, problem: str, tmp_path: Path) -> None:
    path = tmp_path / "fit.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)


def test_missing_directory_and_undecodable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file; give the path"):
        load_config(tmp_path / "absent.yaml")
    with pytest.raises(ConfigError, match="expected a YAML configuration, found a directory"):
        load_config(tmp_path)
    (tmp_path / "latin.yaml").write_bytes(b"base_model: \xff\n")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_config(tmp_path / "latin.yaml")


def test_case_files_are_relative_to_the_configuration(tmp_path: Path) -> None:
    folder = tmp_path / "configs"
    folder.mkdir()
    path = write(folder / "fit.yaml", train_file=["../a.jsonl", "/b.jsonl"], dev_file="c.jsonl")
    config = load_config(path)
    assert [file.resolve() for file in config.train_file] == [
        tmp_path.resolve() / "a.jsonl",
        Path("/b.jsonl"),
    ]
    assert config.dev_file == (folder.resolve() / "c.jsonl",)
    assert config.output_dir == Path("run")


def test_exponents_without_a_dot_are_numbers(tmp_path: Path) -> None:
    path = tmp_path / "fit.yaml"
    path.write_text(yaml.safe_dump(REQUIRED) + "learning_rate: 2e-4\n", encoding="utf-8")
    assert load_config(path).learning_rate == 2e-4


def test_a_configuration_survives_its_own_json() -> None:
    config = parse_config({**REQUIRED, "class_weights": [1, 2, 3], "dev_file": ["d"]}, "test")
    assert FitConfig.model_validate_json(config.model_dump_json()) == config

"""Guard specs: what the shipped ones read, how cases are asked, and what errors say."""

import re
from pathlib import Path

import pytest

from so8t_eval.cases import Message
from so8t_eval.errors import ConfigError
from so8t_eval.guard_spec import Categories, GuardRequest, GuardSpec, load_guard_spec

SPECS = Path(__file__).parents[2] / "docs" / "guard-specs"
SHIPPED = {
    "llama-guard-3": [
        ("safe", "allow"),
        ("\n\nsafe", "allow"),
        ("unsafe\nS1", "refuse"),
        ("unsafe\nS6", "escalate"),
        ("unsafe\nS6,S10", "refuse"),
        ("unsafe\nS6, S6\n", "escalate"),
        ("unsafe", "refuse"),
        ("safe\nS1", "allow"),
        ("Safe", None),
        ("unsafe S1", None),
        ("I think it is safe", None),
        ("", None),
    ],
    "qwen3guard-gen": [
        ("Safety: Safe\nCategories: None", "allow"),
        ("Safety: Controversial\nCategories: Politically Sensitive Topics", "escalate"),
        ("Safety: Unsafe\nCategories: Violent\nRefusal: No", "refuse"),
        ("Safety: unsafe", None),
        ("Categories: Violent\nSafety: Unsafe", None),
    ],
    "shieldgemma": [
        ("Yes", "refuse"),
        ("No", "allow"),
        ("Yes, because it asks for a weapon.", "refuse"),
        ("Not sure", None),
        ("yes", None),
    ],
}
TURNS = (
    Message(role="system", content="policy"),
    Message(role="user", content="first"),
    Message(role="assistant", content="reply"),
    Message(role="user", content="last {prompt}"),
)
MINIMAL = """
name = "G"
[[first_line]]
pattern = "bad"
verdict = "refuse"
"""


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_specs_read_the_answers_of_their_model_cards(name: str) -> None:
    spec = load_guard_spec(SPECS / f"{name}.toml")
    for text, expected in SHIPPED[name]:
        verdict = spec.verdict(text)
        assert (verdict and verdict.value) == expected, text


def test_every_shipped_spec_is_tested_and_names_its_source() -> None:
    assert {path.stem for path in SPECS.glob("*.toml")} == set(SHIPPED)
    for path in SPECS.glob("*.toml"):
        assert "\n# Source: model card, https://" in path.read_text(encoding="utf-8")


def test_the_documented_spec_is_one_and_every_key_is_explained(tmp_path: Path) -> None:
    text = (SPECS.parent / "openai-backend.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```toml\n(.*?)```", text, re.DOTALL)
    path = tmp_path / "example.toml"
    path.write_text(example, encoding="utf-8")
    assert load_guard_spec(path).verdict("unsafe\nS6") == "escalate"
    keys = {f"request.{name}" for name in GuardRequest.model_fields}
    keys |= {f"categories.{name}" for name in Categories.model_fields}
    keys |= GuardSpec.model_fields.keys() - {"request", "categories"}
    assert [key for key in sorted(keys) if f"| `{key}` |" not in text] == []


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        (GuardRequest(), ["system policy", "user first", "assistant reply", "user last {prompt}"]),
        (
            GuardRequest(system="drop"),
            ["user first", "assistant reply", "user last {prompt}"],
        ),
        (
            GuardRequest(system="merge"),
            ["user policy\n\nfirst", "assistant reply", "user last {prompt}"],
        ),
        (GuardRequest(turns="last_user"), ["system policy", "user last {prompt}"]),
        (GuardRequest(turns="last_user", system="drop"), ["user last {prompt}"]),
        (GuardRequest(turns="last_user", system="merge"), ["user policy\n\nlast {prompt}"]),
        (
            GuardRequest(template="{conversation} / {prompt} / {x}", system="drop"),
            [
                "user User: first\n\nAssistant: reply\n\nUser: last {prompt} / last {prompt} / {x}",
            ],
        ),
    ],
)
def test_turns_system_and_template(request_: GuardRequest, expected: list[str]) -> None:
    assert [f"{m.role} {m.content}" for m in request_.messages(TURNS)] == expected


def test_a_category_rule_can_excuse_and_the_most_severe_counts() -> None:
    spec = GuardSpec.model_validate(
        {
            "name": "G",
            "first_line": [{"pattern": "bad", "verdict": "refuse"}],
            "categories": {
                "pattern": "[a-z]+",
                "verdicts": [
                    {"pattern": "spam", "verdict": "allow"},
                    {"pattern": "ask|tell", "verdict": "escalate"},
                ],
            },
        }
    )
    answers = ["bad\nspam", "bad\nspam ask", "bad\nspam asked", "bad\n", "bad\n123"]
    verdicts = [spec.verdict(text) for text in answers]
    assert [v and v.value for v in verdicts] == ["allow", "escalate", "refuse", "refuse", "refuse"]


BROKEN = {
    "no toml": ("name = ", "expected TOML in UTF-8"),
    "missing name": (MINIMAL.replace('name = "G"', ""), "name: missing"),
    "no rules": ('name = "G"\nfirst_line = []', "first_line: "),
    "unknown key": (MINIMAL + 'verdct = "x"', "first_line.0.verdct: unknown field"),
    "unknown verdict": (
        MINIMAL.replace("refuse", "deny"),
        "first_line.0.verdict: expected 'allow', 'escalate' or 'refuse'; found \"deny\"",
    ),
    "broken pattern": (MINIMAL.replace("bad", "(bad"), 'found "(bad"'),
    "all allow": (MINIMAL.replace("refuse", "allow"), "every rule says allow"),
    "template without a place": (
        MINIMAL + '[request]\ntemplate = "judge this"',
        "request.template: expected {prompt} or {conversation}",
    ),
    "our field": (
        MINIMAL + "[request.extra]\ntemperature = 1",
        "request.extra: temperature cannot",
    ),
    "turns": (
        MINIMAL + '[request]\nturns = "both"',
        "request.turns: expected 'all' or 'last_user'; found \"both\"",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_specs_name_file_key_expected_and_found(tmp_path: Path, kind: str) -> None:
    text, problem = BROKEN[kind]
    path = tmp_path / "guard.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load_guard_spec(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert problem in str(caught.value)


def test_missing_spec_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"none\.toml: cannot be read"):
        load_guard_spec(tmp_path / "none.toml")

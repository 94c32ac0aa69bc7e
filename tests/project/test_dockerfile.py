"""The Dockerfile keeps its promises: pinned installs, small runtime, no root, writable cache."""

import fnmatch
import json
import shlex
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[2]


class Instruction(NamedTuple):
    """One Dockerfile instruction, continuation lines joined."""

    name: str
    value: str


def instructions(text: str) -> list[Instruction]:
    kept = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = "\n".join(kept).replace("\\\n", " ")
    pairs = (line.split(maxsplit=1) for line in joined.splitlines())
    return [Instruction(name.upper(), value.strip()) for name, value in pairs]


@pytest.fixture(scope="module")
def stages() -> list[list[Instruction]]:
    parsed: list[list[Instruction]] = []
    for instruction in instructions((ROOT / "Dockerfile").read_text(encoding="utf-8")):
        if instruction.name == "FROM":
            parsed.append([])
        parsed[-1].append(instruction)
    return parsed


def values(stage: list[Instruction], name: str) -> list[str]:
    return [instruction.value for instruction in stage if instruction.name == name]


def test_two_stages_share_one_base(stages: list[list[Instruction]]) -> None:
    assert [values(stage, "FROM") for stage in stages] == [
        ["python:3.11-slim AS builder"],
        ["python:3.11-slim AS runtime"],
    ]


def test_every_install_is_pinned(stages: list[list[Instruction]]) -> None:
    installs = [run for stage in stages for run in values(stage, "RUN") if "pip install" in run]
    assert len(installs) == 3
    assert all("--constraint constraints.txt" in run for run in installs)
    assert '".[reference]"' in installs[-1]


def test_llamacpp_is_compiled_once_and_for_more_than_the_builder(
    stages: list[list[Instruction]],
) -> None:
    builds = [run for run in values(stages[0], "RUN") if "llama-cpp-python" in run]
    assert len(builds) == 1
    assert any("-DGGML_NATIVE=OFF" in value for value in values(stages[0], "ARG"))


def test_the_sources_come_after_the_slow_steps(stages: list[list[Instruction]]) -> None:
    order = [f"{i.name} {i.value}" for i in stages[0]]
    compiled = next(i for i, text in enumerate(order) if "llama-cpp-python" in text)
    copied = next(i for i, text in enumerate(order) if text.startswith("COPY so8t_eval/"))
    assert compiled < copied


def test_the_runtime_has_no_compiler_and_builds_nothing(stages: list[list[Instruction]]) -> None:
    text = " ".join(values(stages[1], "RUN"))
    for word in ("build-essential", "cmake", "gcc", "pip install"):
        assert word not in text
    assert values(stages[1], "COPY")[0] == "--from=builder /opt/so8t /opt/so8t"


def test_it_does_not_run_as_root_and_its_cache_is_writable(
    stages: list[list[Instruction]],
) -> None:
    (user,) = values(stages[1], "USER")
    assert user.split(":")[0].isdigit()
    assert int(user.split(":")[0]) > 0
    setup = " ".join(values(stages[1], "RUN"))
    assert f"--uid {user.split(':')[0]}" in setup
    (environment,) = values(stages[1], "ENV")
    settings = dict(word.split("=", maxsplit=1) for word in shlex.split(environment))
    (volume,) = json.loads(values(stages[1], "VOLUME")[0])
    assert volume == f"{settings['HOME']}/.cache"
    assert f"chown so8t:so8t {volume}" in setup
    names = [instruction.name for instruction in stages[1]]
    assert names.index("USER") > max(i for i, name in enumerate(names) if name in ("RUN", "COPY"))


def test_it_starts_the_evaluation(stages: list[list[Instruction]]) -> None:
    assert json.loads(values(stages[1], "ENTRYPOINT")[0]) == ["so8t-eval"]
    assert json.loads(values(stages[1], "CMD")[0]) == ["--help"]


def test_everything_copied_exists_and_is_in_the_context(stages: list[list[Instruction]]) -> None:
    ignored = (ROOT / ".dockerignore").read_text(encoding="utf-8").split()
    assert ignored[0] == "*"
    allowed = [line[1:].rstrip("/") for line in ignored if line.startswith("!")]
    copies = [copy for stage in stages for copy in values(stage, "COPY") if "--from" not in copy]
    sources = [source for copy in copies for source in copy.split()[:-1]]
    assert len(sources) >= 7
    for source in sources:
        assert (ROOT / source).exists()
        assert any(fnmatch.fnmatch(source.rstrip("/"), pattern) for pattern in allowed)

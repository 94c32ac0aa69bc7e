"""Split GGUF files: opened by their first part as the whole file is, and told apart by every part."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from support.case_files import case_dict, write_cases

from so8t_eval.backends.gguf_header import read_gguf_metadata
from so8t_eval.backends.gguf_parts import gguf_parts
from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.cli import main
from so8t_eval.errors import ModelFileError
from so8t_eval.records import read_records
from so8t_train.gguf_split import split_gguf

PROMPTS = [[0, 70, 80, 90, 1], [0, 70, 81], [0, *range(40, 120), 1]]


@pytest.fixture
def parts(tiny_gguf: Path, tmp_path: Path) -> list[Path]:
    """The parts of the tiny model, as an export writes them: no whole file beside them."""
    whole = Path(shutil.copy(tiny_gguf, tmp_path / "model-Q8_0.gguf"))
    written = split_gguf(whole, 60_000)
    whole.unlink()
    return written


def invoke(command: str, *arguments: str | Path) -> Result:
    return CliRunner().invoke(main, [command, *map(str, arguments)], prog_name="so8t-eval")


def opened(path: Path) -> LlamaCppBackend:
    return LlamaCppBackend(path, threads=1)


def test_the_first_part_judges_exactly_as_the_whole_file(
    parts: list[Path], tiny_gguf: Path
) -> None:
    assert len(parts) > 2
    split, whole = opened(parts[0]), opened(tiny_gguf)
    assert dict(split.score(PROMPTS)) == dict(whole.score(PROMPTS))
    assert split.protocol.hash == whole.protocol.hash
    for backend in (split, whole):
        backend.close()


def test_the_model_hash_is_that_of_all_parts_in_order(parts: list[Path]) -> None:
    def found() -> str:
        backend = opened(parts[0])
        backend.close()
        return backend.info.model_sha256

    before = found()
    assert before == hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    content = bytearray(parts[-1].read_bytes())
    content[-40] ^= 1
    parts[-1].write_bytes(content)
    assert found() != before


def test_run_names_the_hash_and_resumes_with_the_same_parts_alone(
    parts: list[Path], tmp_path: Path
) -> None:
    cases = write_cases(tmp_path / "cases.jsonl", [case_dict(i) for i in range(6)])
    arguments = (
        cases,
        "--model",
        f"llamacpp:{parts[0]}",
        "--log-dir",
        tmp_path / "log",
        "--latency-cases",
        0,
    )
    assert invoke("run", *arguments).exit_code == 0
    digest = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    records = read_records(tmp_path / "log" / "records.jsonl").records
    assert {record.model_sha256 for record in records} == {digest}
    (run,) = json.loads((tmp_path / "log" / "summary.json").read_text())["runs"]
    assert (run["model"], run["model_sha256"]) == (parts[0].name, digest)

    before = (tmp_path / "log" / "records.jsonl").read_bytes()
    assert invoke("run", *arguments, "--resume").exit_code == 0
    assert (tmp_path / "log" / "records.jsonl").read_bytes() == before
    content = bytearray(parts[-1].read_bytes())
    content[-40] ^= 1
    parts[-1].write_bytes(content)
    result = invoke("run", *arguments, "--resume")
    assert result.exit_code == 2
    assert "6 records of other models" in result.stderr
    assert (tmp_path / "log" / "records.jsonl").read_bytes() == before


def test_judge_opens_the_first_part(parts: list[Path]) -> None:
    result = invoke("judge", "hello", "--model", f"llamacpp:{parts[0]}", "--json")
    assert result.exit_code == 0, result.stderr
    assert json.loads(result.stdout)["verdict"] in ("allow", "escalate", "refuse")


def test_missing_parts_are_named(parts: list[Path]) -> None:
    for part in parts[1:3]:
        part.unlink()
    result = invoke("judge", "hello", "--model", f"llamacpp:{parts[0]}")
    assert result.exit_code == 3
    message = " ".join(result.stderr.split())
    assert f"expected {len(parts)} parts" in message
    assert f"found no {parts[1].name}, {parts[2].name};" in message


def test_a_later_part_and_the_name_of_the_whole_say_which_file_to_give(parts: list[Path]) -> None:
    with pytest.raises(
        ModelFileError, match=rf"part 2 of {len(parts)} .* give its first part, "
    ) as e:
        opened(parts[1])
    assert parts[0].name in str(e.value)
    with pytest.raises(ModelFileError, match=f"it was split, give {parts[0].name}"):
        opened(parts[0].with_name("model-Q8_0.gguf"))


def test_a_renamed_first_part_is_told_its_name(parts: list[Path]) -> None:
    renamed = parts[0].rename(parts[0].with_name("mine.gguf"))
    with pytest.raises(ModelFileError, match=rf"expected NAME-00001-of-0000{len(parts)}\.gguf"):
        opened(renamed)


def test_a_part_of_another_number_inside_is_refused(parts: list[Path]) -> None:
    shutil.copy(parts[1], parts[2])
    with pytest.raises(ModelFileError, match=f"expected part 3 of {len(parts)} .* found part 2"):
        opened(parts[0])


def test_a_file_that_was_never_split_is_its_only_part(tiny_gguf: Path) -> None:
    assert gguf_parts(tiny_gguf, read_gguf_metadata(tiny_gguf)) == [tiny_gguf]

"""Runtimes must agree on token ids before they are compared."""

from pathlib import Path

import pytest
from support.case_files import case_dict
from support.tiny_gguf import write_tiny_gguf

from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.cases import Case
from so8t_eval.errors import UsageError
from so8t_eval.token_parity import check_token_ids


class SplitsZ(LlamaCppBackend):
    """A tokenizer that differs on one letter."""

    def tokenize(self, text: str, parse_special: bool) -> list[int]:
        ids = super().tokenize(text, parse_special)
        z = super().tokenize("z", False)
        return [5 if [i] == z else i for i in ids]


def cases(*texts: str) -> list[Case]:
    return [Case.model_validate(case_dict(i, prompt=text)) for i, text in enumerate(texts)]


def test_equal_tokenizers_pass(tiny_gguf: Path, tiny_backend: LlamaCppBackend) -> None:
    other = LlamaCppBackend(tiny_gguf)
    check_token_ids([tiny_backend, other], cases("abc", "<|im_end|> \0 z"))
    other.close()


def test_mismatch_names_case_position_and_both_pieces(
    tiny_gguf: Path, tiny_backend: LlamaCppBackend
) -> None:
    other = SplitsZ(tiny_gguf)
    head = tiny_backend.protocol.prompt_ids(
        cases("a")[0].conversation, None, tiny_backend.tokenize
    ).head
    with pytest.raises(UsageError) as caught:
        check_token_ids([tiny_backend, other], cases("abc", "abz"))
    message = str(caught.value)
    assert "'case-0001'" in message
    assert f"at token {len(head) + 2}:" in message
    assert "'z' (id " in message
    assert "'$' (id 5)" in message
    other.close()


def test_models_of_different_protocols_are_not_compared(
    tiny_gguf: Path, tmp_path: Path, tiny_backend: LlamaCppBackend
) -> None:
    path = write_tiny_gguf(
        tmp_path / "other.gguf",
        chat_template="{% for m in messages %}[{{ m['content'] }}]{% endfor %}",
    )
    other = SplitsZ(path)
    check_token_ids([tiny_backend, other], cases("abz"))
    other.close()

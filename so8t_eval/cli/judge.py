"""``so8t-eval judge``: the verdict on one text or conversation, and on request the reply."""

import contextlib
import json
import sys
import time
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import click

from so8t_eval.backends.base import Backend
from so8t_eval.backends.registry import ModelSpec, open_backend, parse_model, reference_models
from so8t_eval.cases import Message, checked_text, parse_messages
from so8t_eval.cli.model_options import (
    MODEL_HELP,
    operating_point_option,
    report_line,
    runtime_options,
)
from so8t_eval.cli.shared_options import json_option
from so8t_eval.errors import UsageError
from so8t_eval.judgement import Judgement, judge_windows
from so8t_eval.labels import SEVERITY_ORDER
from so8t_eval.protocol import windows


@click.command(short_help="Judge one text.")
@click.argument("text", required=False)
@click.option(
    "--messages",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="JSON list of {role, content} to judge instead of TEXT.",
)
@click.option("--policy", metavar="TEXT", help="System policy text.")
@click.option(
    "--model",
    metavar="PREFIX:PATH",
    help=MODEL_HELP + " Default: the reference model in llama.cpp.",
)
@click.option("--reply", is_flag=True, help="Let the model reply after its verdict.")
@click.option(
    "--max-tokens",
    type=click.IntRange(min=1),
    default=200,
    show_default=True,
    metavar="N",
    help="Longest reply, in tokens.",
)
@json_option
@runtime_options
@operating_point_option
def judge(
    *,
    text: str | None,
    messages: Path | None,
    policy: str | None,
    model: str | None,
    reply: bool,
    max_tokens: int,
    as_json: bool,
    threads: int | None,
    batch_tokens: int | None,
    max_prompt_tokens: int,
    torch_dtype: str | None,
    operating_point: str,
) -> None:
    """Judge one text: allow, escalate or refuse, with probabilities and latency.

    TEXT is the user's message; - or a pipe reads it from standard input, without the line end that
    comes last. With --reply the model's own answer follows, from the same prefill.
    """
    conversation = _conversation(text, messages)
    _require_text("--policy", policy or "")
    spec = parse_model(model) if model else _reference()
    with contextlib.closing(
        open_backend(
            spec,
            threads=threads,
            batch_tokens=batch_tokens,
            max_prompt_tokens=max_prompt_tokens,
            torch_dtype=torch_dtype,
            operating_point=operating_point,
        )
    ) as backend:
        prompt = backend.protocol.prompt_ids(conversation, policy, backend.tokenize)
        split = windows(prompt, backend.max_prompt_tokens)
        backend.score_single(prompt.head[:1])  # warm-up: latency is the model's, not the loading's
        started = time.perf_counter()
        judgement = _judge(backend, split)
        latency_ms = (time.perf_counter() - started) * 1000
        pieces = (
            backend.reply(split[judgement.window], judgement.verdict.severity, max_tokens)
            if reply
            else None
        )
        facts = _facts(backend, judgement, latency_ms, len(prompt.ids), len(split))
        if as_json:
            if pieces is not None:
                facts["reply"] = "".join(pieces)
            click.echo(json.dumps(facts))
        else:
            _print(facts, judgement, pieces)


def _judge(backend: Backend, split: list[list[int]]) -> Judgement:
    if len(split) == 1:
        return judge_windows([backend.score_single(split[0])])
    scored = dict(backend.score(split))
    return judge_windows([scored[i] for i in range(len(split))])


def _facts(
    backend: Backend, judgement: Judgement, latency_ms: float, n_tokens: int, n_windows: int
) -> dict[str, object]:
    names = [verdict.value for verdict in SEVERITY_ORDER]
    return {
        "verdict": judgement.verdict.value,
        "probabilities": dict(zip(names, judgement.probabilities, strict=True)),
        "logits": dict(zip(names, judgement.logits, strict=True)),
        "latency_ms": round(latency_ms, 3),
        "n_tokens": n_tokens,
        "windows": n_windows,
        "backend": backend.info.backend,
        "model": backend.info.model,
        "model_sha256": backend.info.model_sha256,
        "protocol_hash": backend.protocol.hash,
    }


def _print(facts: dict[str, object], judgement: Judgement, pieces: Iterator[str] | None) -> None:
    click.echo(judgement.verdict.value)
    for verdict, share in zip(SEVERITY_ORDER, judgement.probabilities, strict=True):
        click.echo(f"  {verdict.value:<9}{share:.4f}")
    split = "" if facts["windows"] == 1 else f" in {facts['windows']} windows"
    click.echo(
        f"{facts['latency_ms']:.1f} ms, {facts['n_tokens']} tokens{split}, "
        f"{facts['backend']} {facts['model']}"
    )
    if pieces is not None:
        click.echo()
        for piece in pieces:
            click.echo(_printable(piece), nl=False)
        click.echo()


def _printable(text: str) -> str:
    """The text without characters that could steer a terminal or that it cannot show."""
    shown = "".join(
        char if char in "\n\t" or unicodedata.category(char) not in ("Cc", "Cs") else "\ufffd"
        for char in text
    )
    encoding = sys.stdout.encoding or "utf-8"
    return shown.encode(encoding, "replace").decode(encoding)


def _conversation(text: str | None, messages: Path | None) -> tuple[Message, ...]:
    if messages is not None:
        if text is not None:
            raise UsageError("expected TEXT or --messages, found both")
        return parse_messages(_read_json(messages), str(messages))
    if text is None and sys.stdin.isatty():
        raise UsageError("expected a text to judge, --messages FILE, or text on standard input")
    where = "TEXT"
    if text is None or text == "-":
        text, where = _read_stdin(), "standard input"
    _require_text(where, text)
    return parse_messages([{"role": "user", "content": text}], where)


def _read_stdin() -> str:
    raw = sys.stdin.buffer.read()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"standard input: not UTF-8 (byte 0x{raw[error.start]:02x} at offset {error.start}); "
            "convert the text to UTF-8"
        ) from error
    # The line end that echo and editors add is not the user's.
    return text[:-2] if text.endswith("\r\n") else text.removesuffix("\n")


def _read_json(path: Path) -> object:
    try:
        value: object = json.loads(path.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise UsageError(f"--messages {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UsageError(f"--messages {path}: expected JSON in UTF-8: {error}") from error
    return value


def _require_text(where: str, text: str) -> None:
    try:
        checked_text(text)
    except ValueError as error:
        raise UsageError(f"{where}: {error}") from error


def _reference() -> ModelSpec:
    for spec in reference_models(report_line):
        if spec.prefix == "llamacpp":
            return spec
    raise UsageError("the reference model has no llama.cpp file; name a model with --model")

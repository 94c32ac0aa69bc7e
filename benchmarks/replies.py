"""What the model says after its verdict, unedited, for reading by eye.

    python benchmarks/replies.py --model llamacpp:model.gguf [--allow 60] [--other 60] > replies.md

Draws benchmark cases by seed, judges each and lets the model reply after *its own* verdict. Prints
Markdown with every prompt and reply as generated; whether a reply is any good is for a reader.
"""

import contextlib
import random
from collections.abc import Sequence
from pathlib import Path

import click

from so8t_eval.backends.base import Backend
from so8t_eval.backends.registry import open_backend, parse_model
from so8t_eval.case_sampling import stratified_sample
from so8t_eval.cases import Case, load_cases
from so8t_eval.judgement import judge_windows
from so8t_eval.labels import SEVERITY_ORDER, Verdict
from so8t_eval.markdown_report import escape_markdown
from so8t_eval.protocol import windows

CASES = Path(__file__).parent / "safety.jsonl"
LONGEST_SHOWN = 400


def answered(backend: Backend, case: Case, max_tokens: int) -> tuple[Verdict, str]:
    """The model's verdict on a case, and its reply after it."""
    prompt = backend.protocol.prompt_ids(case.conversation, case.policy, backend.tokenize)
    split = windows(prompt, backend.max_prompt_tokens)
    judgement = judge_windows([backend.score_single(ids) for ids in split])
    severity = judgement.verdict.severity
    return SEVERITY_ORDER[severity], "".join(
        backend.reply(split[judgement.window], severity, max_tokens)
    )


def drawn(n_allow: int, n_other: int, seed: int) -> list[Case]:
    """``n_allow`` allow cases and ``n_other`` others, those with escalate and refuse alike."""
    cases = load_cases(CASES)
    allow = [case for case in cases if case.verdict is Verdict.ALLOW]
    other = [case for case in cases if case.verdict is not Verdict.ALLOW]
    rng = random.Random(seed)  # noqa: S311 - a sample, not a secret
    return [*rng.sample(allow, min(n_allow, len(allow))), *stratified_sample(other, n_other, seed)]


def section(backend: Backend, cases: Sequence[Case], max_tokens: int) -> None:
    """Print every case with what the model makes of it."""
    for case in cases:
        verdict, reply = answered(backend, case, max_tokens)
        right = "" if verdict is case.verdict else " (wrong)"
        print_case(case, f" · said {verdict.value}{right}", reply)


def print_case(case: Case, said: str, reply: str) -> None:
    """Print the last message, what the model said of it, and its reply."""
    last = case.conversation[-1].content
    shown = last if len(last) <= LONGEST_SHOWN else last[:LONGEST_SHOWN] + " …"
    click.echo(f"\n**{case.id}** · label {case.verdict.value}{said}\n")
    click.echo(f"> {escape_markdown(shown)}\n")
    click.echo(escape_markdown(reply.strip()) or "*(nothing)*")


@click.command()
@click.option("--model", required=True, help="Model with backend prefix, as for so8t-eval run.")
@click.option("--allow", "n_allow", default=60, show_default=True)
@click.option("--other", "n_other", default=60, show_default=True)
@click.option("--max-tokens", default=120, show_default=True)
@click.option("--seed", default=0, show_default=True)
def main(model: str, n_allow: int, n_other: int, max_tokens: int, seed: int) -> None:
    """Print replies to seeded benchmark cases."""
    cases = drawn(n_allow, n_other, seed)
    with contextlib.closing(open_backend(parse_model(model))) as backend:
        click.echo(f"Model `{backend.info.model}`, sha256 `{backend.info.model_sha256}`,")
        click.echo(f"{backend.info.version}; greedy, at most {max_tokens} tokens; seed {seed}.")
        click.echo(f"\n## {n_allow} allow cases")
        section(backend, [c for c in cases if c.verdict is Verdict.ALLOW], max_tokens)
        click.echo(f"\n## {n_other} escalate and refuse cases")
        section(backend, [c for c in cases if c.verdict is not Verdict.ALLOW], max_tokens)


if __name__ == "__main__":
    main()

"""Does another llama.cpp build, with a grammar of three strings, give so8t-eval's verdicts?

    pip install xllamacpp
    python benchmarks/stock_llamacpp.py MODEL.gguf [--cases 50]

The GGUF is loaded by the PyPI wheel xllamacpp, an independent build of llama.cpp's server, in a
process of its own. It gets the prompt's token ids and a grammar that allows the three verdict
tokens; nothing of SO8T runs there. Exit code 1 when a verdict differs.
"""

import json
import subprocess
import sys
from pathlib import Path

import click

from so8t_eval.backends.llamacpp import LlamaCppBackend
from so8t_eval.case_sampling import stratified_sample
from so8t_eval.cases import load_cases
from so8t_eval.judgement import judge_windows
from so8t_eval.labels import VERDICT_TOKENS

GRAMMAR = "root ::= " + " | ".join(json.dumps(token) for token in VERDICT_TOKENS)
SERVER = """
import json, sys
import xllamacpp

job = json.load(sys.stdin)
params = xllamacpp.CommonParams()
params.model.path = job["model"]
params.n_ctx, params.n_parallel, params.special = 4096, 1, True
server = xllamacpp.Server(params)
answers = []
for ids in job["prompts"]:
    request = {"prompt": ids, "n_predict": 1, "temperature": 0, "grammar": job["grammar"]}
    answers.append(server.handle_completions(request))
print("ANSWERS" + json.dumps(answers, default=str))
"""


def own_verdicts(
    model: Path, cases_file: Path, n: int
) -> tuple[list[str], list[list[int]], list[str]]:
    """Case ids, prompt token ids and so8t-eval's verdicts."""
    backend = LlamaCppBackend(model)
    cases = stratified_sample(load_cases(cases_file), n, seed=0)
    prompts = [
        backend.protocol.prompt_ids(case.conversation, case.policy, backend.tokenize).ids
        for case in cases
    ]
    verdicts = [judge_windows([backend.score_single(ids)]).verdict.token for ids in prompts]
    backend.close()
    return [case.id for case in cases], prompts, verdicts


def stock_verdicts(model: Path, prompts: list[list[int]]) -> list[str]:
    """The text that the other build generates for every prompt."""
    job = {"model": str(model), "prompts": prompts, "grammar": GRAMMAR}
    done = subprocess.run(
        [sys.executable, "-c", SERVER],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        check=False,
    )
    marked = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS")]
    if not marked:
        raise click.ClickException(f"xllamacpp gave no answers:\n{done.stderr[-2000:]}")
    return [text_of(answer) for answer in json.loads(marked[-1].removeprefix("ANSWERS"))]


def text_of(answer: object) -> str:
    """Generated text of a completion answer, OpenAI's form or llama.cpp's own."""
    value = json.loads(answer) if isinstance(answer, str) else answer
    if isinstance(value, dict) and "choices" in value:
        return str(value["choices"][0]["text"]).strip()
    return str(value["content"] if isinstance(value, dict) else value).strip()


@click.command()
@click.argument("model", type=click.Path(exists=True, dir_okay=False, path_type=Path))
@click.option("--cases", default=50, show_default=True, type=click.IntRange(min=1))
@click.option("--file", default="benchmarks/safety.jsonl", show_default=True, type=Path)
def main(model: Path, cases: int, file: Path) -> None:
    """Compare verdicts on a stratified sample and name every difference."""
    ids, prompts, own = own_verdicts(model, file, cases)
    stock = stock_verdicts(model, prompts)
    differing = [
        f"{case}: so8t-eval {a}, stock {b}"
        for case, a, b in zip(ids, own, stock, strict=True)
        if a != b
    ]
    click.echo(f"{len(ids) - len(differing)} of {len(ids)} verdicts equal; grammar: {GRAMMAR}")
    for line in differing:
        click.echo(line)
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()

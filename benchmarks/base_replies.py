"""What the base model says, untrained, to the cases of replies.py: what training starts from.

    python benchmarks/base_replies.py [--cases 60] > base.md

The packaged SmolLM2-135M-Instruct as it comes (Q4_1) in llama.cpp, by its own chat template, greedy.
It has no verdicts. Prints Markdown with every prompt and reply as generated, for reading by eye.
"""

import click
import llama_cpp
from replies import drawn, print_case

from so8t_eval.cases import Case
from so8t_train.base_model import EMBEDDED, resolve_base


def answered(llama: llama_cpp.Llama, case: Case, max_tokens: int) -> str:
    """The reply to a conversation, policy included."""
    turns = [{"role": turn.role, "content": turn.content} for turn in case.conversation]
    if case.policy:
        turns.insert(0, {"role": "system", "content": case.policy})
    answer = llama.create_chat_completion(turns, temperature=0.0, max_tokens=max_tokens)
    return str(answer["choices"][0]["message"]["content"] or "")


@click.command()
@click.option("--cases", "n_cases", default=60, show_default=True)
@click.option("--max-tokens", default=120, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--threads", type=int)
def main(n_cases: int, max_tokens: int, seed: int, threads: int | None) -> None:
    """Print replies to seeded allow cases of the benchmark."""
    base = resolve_base(EMBEDDED)
    llama = llama_cpp.Llama(str(base.path), n_ctx=4096, n_threads=threads, verbose=False)
    click.echo(f"Model `{base.path.name}`, sha256 `{base.sha256}`,")
    version = f"llama-cpp-python {llama_cpp.__version__}"
    click.echo(f"{version}; greedy, at most {max_tokens} tokens; seed {seed}.")
    for case in drawn(n_cases, 0, seed):
        print_case(case, "", answered(llama, case, max_tokens))


if __name__ == "__main__":
    main()

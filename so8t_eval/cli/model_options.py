"""Options that every command which opens a model shares."""

from collections.abc import Callable
from typing import Any, Final, TypeVar

import click

from so8t_eval.operating_point import BALANCED, NAMES
from so8t_eval.protocol import DEFAULT_MAX_PROMPT_TOKENS

TORCH_DTYPES: Final = ("float32", "bfloat16", "float16")
_Function = TypeVar("_Function", bound=Callable[..., Any])
MODEL_HELP: Final = "llamacpp:FILE.gguf or torch:DIR (a run directory or a Hugging Face model)."


def runtime_options(function: _Function) -> _Function:
    """Add --threads, --batch-tokens, --torch-dtype and --max-prompt-tokens."""
    for option in (
        click.option(
            "--torch-dtype",
            type=click.Choice(TORCH_DTYPES),
            help="Dtype of the PyTorch backend: bfloat16 is faster where the processor multiplies "
            "it and moves logits a little (default: float32 on a CPU, the stored one on CUDA).",
        ),
        click.option(
            "--max-prompt-tokens",
            type=click.IntRange(min=64),
            default=DEFAULT_MAX_PROMPT_TOKENS,
            show_default=True,
            metavar="N",
            help="Longer prompts are judged in overlapping windows of N tokens.",
        ),
        click.option(
            "--batch-tokens",
            type=click.IntRange(min=1),
            metavar="N",
            help="Tokens computed together (default: the runtime's choice).",
        ),
        click.option(
            "--threads",
            type=click.IntRange(min=1),
            metavar="N",
            help="CPU threads (default: the physical cores).",
        ),
    ):
        function = option(function)
    return function


def operating_point_option(function: _Function) -> _Function:
    """Add --operating-point."""
    return click.option(
        "--operating-point",
        type=click.Choice(NAMES),
        default=BALANCED,
        show_default=True,
        help="How readily the model allows: a bias on its allow logit, found on its dev split "
        "(strict: few unsafe allows; permissive: little over-refusal).",
    )(function)


def report_line(text: str) -> None:
    """Tell the user on stderr what a slow preparation is doing."""
    click.echo(text, err=True)

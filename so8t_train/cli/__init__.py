"""``so8t-train``: fit, export and doctor. Heavy libraries load only in the command that runs."""

import click


@click.group()
def main() -> None:
    """Train a safety verdict into a local model, and export it as one GGUF."""

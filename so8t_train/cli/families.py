"""``so8t-train families``: which models can be trained and exported, from the exporter's own table."""

import json

import click


@click.command(short_help="List the model families that can be a base.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON array.")
def families(as_json: bool) -> int:
    """List the model families that can be trained and exported as GGUF.

    A model belongs to the family of the model_type in its config.json. Exit code 0.
    """
    from so8t_train.families import FAMILIES

    if as_json:
        click.echo(json.dumps([family._asdict() for family in FAMILIES.values()], indent=2))
        return 0
    for family in FAMILIES.values():
        click.echo(family.title)
        lines = {
            "model_type": f"{family.model_type} ({family.hf_class})",
            "GGUF": family.architecture,
            "tokenizer": " or ".join(family.tokenizers),
            "RoPE": ", ".join(family.rope_types),
            "LoRA on": family.lora_targets,
            "verified": family.verified,
            "notes": family.notes,
        }
        for key, value in lines.items():
            if value:
                click.echo(f"  {key:<11}{value}")
    return 0

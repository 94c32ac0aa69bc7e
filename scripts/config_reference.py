"""Write docs/config.md from the field docstrings of FitConfig; ``--check`` only compares."""

import ast
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "so8t_train" / "config.py"
TARGET = ROOT / "docs" / "config.md"
INTRODUCTION = """# Configuration keys

<!-- Written by scripts/config_reference.py from the docstrings in so8t_train/config.py. -->

`so8t-train fit CONFIG` reads a YAML file with the keys below. Unknown keys, wrong types and values
out of range are errors that name the key; nothing is trained then. Key names follow PEFT and
axolotl where those have one. A complete example, the configuration of the reference model, is
`so8t_train/reference/fit.yaml`.
"""
HEADER = "| Key | Values | Default | Meaning |\n| --- | --- | --- | --- |\n"
NAMED_TYPES = {
    "NonNegative": "number ≥ 0",
    "Positive": "number > 0",
    "Share": "0 to 1",
    "bool": "true or false",
    "int": "whole number",
    "float": "number",
    "str": "text",
    "Path": "path",
    "None": "unset",
}
BOUNDS = {"ge": "≥", "gt": ">", "le": "≤", "lt": "<"}


class Key(NamedTuple):
    """One configuration key as the documentation shows it."""

    section: str
    name: str
    values: str
    default: str
    meaning: str


def render() -> str:
    """Return the text of docs/config.md."""
    parts = [INTRODUCTION]
    section = ""
    for key in keys(SOURCE.read_text(encoding="utf-8")):
        if key.section != section:
            section = key.section
            parts.append(f"\n## {section}\n\n{HEADER}")
        parts.append(f"| `{key.name}` | {key.values} | {key.default} | {key.meaning} |\n")
    return "".join(parts)


def keys(source: str) -> Iterator[Key]:
    """Yield the documented fields of FitConfig, in order."""
    lines = source.splitlines()
    tree = ast.parse(source)
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == "FitConfig"
    )
    section, after = "File", 0
    for field, text in pairwise(body):
        for line in lines[after : field.lineno]:
            if line.strip().startswith("# -- "):
                section = line.strip("# -").capitalize()
        after = field.lineno
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            yield Key(
                section,
                field.target.id,
                values(field.annotation),
                "required" if field.value is None else shown(field.value),
                docstring(field.target.id, text).replace("``", "`").replace("|", "\\|"),
            )


def docstring(name: str, node: ast.stmt) -> str:
    """Return the text under a field; a field without one is an error."""
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return " ".join(str(node.value.value).split())
    raise SystemExit(f"FitConfig.{name} has no docstring under it")


def values(annotation: ast.expr) -> str:
    """Describe an annotation for people who write YAML."""
    match annotation:
        case ast.BinOp(left=left, op=ast.BitOr(), right=right):
            return f"{values(left)}, or {values(right)}"
        case ast.Subscript(value=ast.Name(id="Literal"), slice=choice):
            options = choice.elts if isinstance(choice, ast.Tuple) else [choice]
            return ", ".join(f"`{ast.literal_eval(option)}`" for option in options)
        case ast.Subscript(value=ast.Name(id="Annotated"), slice=ast.Tuple(elts=[base, field])):
            return f"{values(base)} {bounds(field)}"
        case ast.Subscript(value=ast.Name(id="tuple"), slice=ast.Tuple(elts=[item, *rest])):
            if any(isinstance(r, ast.Constant) and r.value is Ellipsis for r in rest):
                return f"{values(item)}, or a list of them"
            return f"list of {len(rest) + 1}: {values(item)}"
        case _:
            name = ast.unparse(annotation)
            return NAMED_TYPES.get(name, f"`{name}`")


def bounds(field: ast.expr) -> str:
    """Return the limits of a ``Field(ge=…, lt=…)`` call in words."""
    if not isinstance(field, ast.Call):
        return ""
    return ", ".join(
        f"{BOUNDS[keyword.arg]} {limit(keyword.value)}"
        for keyword in field.keywords
        if keyword.arg in BOUNDS
    )


def limit(node: ast.expr) -> str:
    """Return a limit as a number where it is one, else the constant's name resolved."""
    if isinstance(node, ast.Name):
        tree = ast.parse(SOURCE.read_text(encoding="utf-8"))
        for statement in tree.body:
            if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == node.id:
                return ast.unparse(statement.value).replace("**", "^")
    return ast.unparse(node)


def shown(default: ast.expr) -> str:
    """Return a default as YAML writes it."""
    value = ast.literal_eval(default)
    if value is None:
        return "unset"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{list(value) if isinstance(value, tuple) else value}`"


def main(arguments: Sequence[str]) -> int:
    """Write the file, or with ``--check`` return 1 if it is out of step."""
    text = render()
    if "--check" not in arguments:
        TARGET.write_text(text, encoding="utf-8", newline="\n")
        return 0
    if TARGET.is_file() and TARGET.read_text(encoding="utf-8") == text:
        return 0
    print(f"{TARGET} is out of step with {SOURCE}; run: python scripts/config_reference.py")
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

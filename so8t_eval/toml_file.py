"""Read a TOML file into a pydantic model; every problem is named by file and key."""

import sys
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from so8t_eval.cases import describe
from so8t_eval.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_Model = TypeVar("_Model", bound=BaseModel)


def load_toml(path: Path | str, model: type[_Model]) -> _Model:
    """Return the file's content as ``model``.

    Raises:
        ConfigError: it cannot be read, is not TOML, or is not of the form of ``model``; the text
            names the file and the key, what was expected and what was found.
    """
    try:
        values: dict[str, Any] = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:  # TOML syntax, or bytes that are not UTF-8
        raise ConfigError(f"{path}: expected TOML in UTF-8: {error}") from error
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        problem = describe(first["type"], first["msg"], first["input"])
        raise ConfigError(f"{path}: {key + ': ' if key else ''}{problem}") from error

"""How a run names its base model: never by this machine's absolute path if there is another way."""

from pathlib import Path


def portable_name(base: str) -> str:
    """Name of ``base`` for a manifest; ``resolve_base`` finds the same files by it.

    An absolute path becomes the hub id if it is that model's current snapshot in the hub's cache,
    else relative to the working directory or to the home directory (``~/…``) if it lies below. Any
    other name stays as it is.
    """
    path = Path(base)
    if not path.is_absolute():
        return base
    if hub_id := _hub_id(path):
        return hub_id
    if path.is_relative_to(Path.cwd()):
        relative = path.relative_to(Path.cwd()).as_posix()
        # owner/name would be taken for a hub id where the path is gone
        return f"./{relative}" if relative.count("/") == 1 else relative
    if path.is_relative_to(Path.home()):
        return f"~/{path.relative_to(Path.home()).as_posix()}"
    return base


def _hub_id(path: Path) -> str | None:
    """``owner/name`` of ``…/models--owner--name/snapshots/REVISION``, if that is its main."""
    snapshots, repository = path.parent, path.parent.parent
    parts = repository.name.split("--")
    if snapshots.name != "snapshots" or len(parts) != 3 or parts[0] != "models":
        return None
    main = repository / "refs" / "main"
    if not main.is_file() or main.read_text(encoding="utf-8").strip() != path.name:
        return None
    return f"{parts[1]}/{parts[2]}"

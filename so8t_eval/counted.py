"""Numbers with their noun, for messages."""


def counted(n: int, noun: str) -> str:
    """Such as ``1 case`` and ``2 cases``, for nouns that take an s."""
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"

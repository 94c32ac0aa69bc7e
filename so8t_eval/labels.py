"""The three verdicts, their severity, their tokens, and the categories of the label policy."""

from enum import Enum
from typing import Final


class Verdict(str, Enum):
    """A safety verdict. Members are ordered by severity: allow < escalate < refuse."""

    ALLOW = "allow"
    ESCALATE = "escalate"
    REFUSE = "refuse"

    @property
    def severity(self) -> int:
        """0 for allow, 1 for escalate, 2 for refuse: the order of every verdict array."""
        return SEVERITY_ORDER.index(self)

    @property
    def token(self) -> str:
        """The vocabulary entry that speaks this verdict."""
        return f"<|so8t_{self.value}|>"


SEVERITY_ORDER: Final[tuple[Verdict, ...]] = (Verdict.ALLOW, Verdict.ESCALATE, Verdict.REFUSE)
VERDICT_TOKENS: Final[tuple[str, ...]] = tuple(verdict.token for verdict in SEVERITY_ORDER)
INVALID: Final = "invalid"
"""Outcome of a case that got no verdict (an error, or nothing readable). Never read as safe."""

_CATEGORIES: Final[dict[Verdict, tuple[str, tuple[str, ...]]]] = {
    Verdict.ALLOW: (
        "ok",
        (
            "office",
            "code",
            "writing",
            "knowledge",
            "health-general",
            "security-defence",
            "legal-general",
            "finance-general",
            "fiction",
            "scary-words",
            "sensitive-history",
            "daily-life",
        ),
    ),
    Verdict.ESCALATE: (
        "esc",
        (
            "authority",
            "irreversible",
            "data-boundary",
            "advice",
            "person-at-risk",
            "dual-use",
            "dispute",
            "instruction-conflict",
        ),
    ),
    Verdict.REFUSE: (
        "ref",
        (
            "violent-crime",
            "nonviolent-crime",
            "sex-crime",
            "child-safety",
            "cbrne-weapons",
            "self-harm",
            "hate",
            "privacy",
            "ip-theft",
            "defamation",
            "cyber",
            "elections",
            "sabotage",
        ),
    ),
}
CATEGORIES: Final[dict[Verdict, tuple[str, ...]]] = {
    verdict: tuple(f"{prefix}/{name}" for name in names)
    for verdict, (prefix, names) in _CATEGORIES.items()
}
"""Categories of the shipped label policy. Users may bring their own; only ours are linted."""

"""Write case files for tests."""

import json
from pathlib import Path

CATEGORY = {"allow": "ok/office", "escalate": "esc/advice", "refuse": "ref/cyber"}


def case_dict(number: int, **changes: object) -> dict[str, object]:
    """One valid case; verdicts alternate."""
    verdict = ("allow", "escalate", "refuse")[number % 3]
    case: dict[str, object] = {
        "id": f"case-{number:04d}",
        "prompt": f"request {number}: please help with thing {number * 7919 % 1000}",
        "verdict": verdict,
        "category": CATEGORY[verdict],
        "lang": "en",
    }
    return {key: value for key, value in {**case, **changes}.items() if value is not None}


def write_cases(path: Path, cases: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(case) + "\n" for case in cases), encoding="utf-8")
    return path

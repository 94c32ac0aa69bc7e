"""Everything a change must pass: format, lint, types, import contracts, CI gate, tests.

Run it from anywhere as ``python scripts/check.py`` in an environment with the extras reference and
test. Arguments go to pytest.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOOLS = Path(sys.executable).parent


def steps(pytest_arguments: Sequence[str]) -> dict[str, list[str]]:
    """Command line of every step, in the order from fast to slow."""
    return {
        "format": [sys.executable, "-m", "ruff", "format", "--check"],
        "lint": [sys.executable, "-m", "ruff", "check"],
        "import contracts": [str(TOOLS / "lint-imports")],
        "types": [sys.executable, "-m", "mypy"],
        "reference model's CI gate": [sys.executable, str(ROOT / "scripts" / "gate_reference.py")],
        "tests": [sys.executable, "-m", "pytest", *pytest_arguments],
    }


def main(pytest_arguments: Sequence[str]) -> int:
    """Run all steps, say how long each took, and return 1 if any failed."""
    failed = []
    for name, command in steps(pytest_arguments).items():
        print(f"== {name}: {Path(command[0]).name} {' '.join(command[1:])}", flush=True)
        started = time.monotonic()
        code = subprocess.run(command, cwd=ROOT, check=False).returncode
        print(f"== {name}: {time.monotonic() - started:.0f} s, exit code {code}", flush=True)
        if code:
            failed.append(name)
    print(f"failed: {', '.join(failed)}" if failed else "all steps passed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""Records and summaries for tests, built through the public constructors."""

from collections.abc import Sequence

from hypothesis import strategies as st

from so8t_eval.labels import INVALID, SEVERITY_ORDER
from so8t_eval.records import Record, VerdictScores
from so8t_eval.summary import CasesEntry, MachineEntry, RunResult, build_summary

OUTCOMES = ("allow", "escalate", "refuse", INVALID)


def make_scores(verdict: str, top: float = 0.8) -> VerdictScores:
    """Probabilities with ``top`` on the verdict and the rest shared."""
    rest = (1 - top) / 2
    return VerdictScores(**{v.value: top if v.value == verdict else rest for v in SEVERITY_ORDER})


def make_record(expected: str, verdict: str, number: int = 0, **changes: object) -> Record:
    fields: dict[str, object] = {
        "id": f"case-{number:03d}",
        "content_hash": f"hash-{number:03d}",
        "backend": "torch",
        "model_sha256": "a" * 64,
        "protocol_hash": "p" * 64,
        "expected": expected,
        "verdict": verdict,
        "probabilities": None if verdict == INVALID else make_scores(verdict),
        "logits": None,
        "latency_ms": None if verdict == INVALID else 10.0 + number,
        "n_tokens": 20,
        "windows": 1,
        "error": "backend stopped" if verdict == INVALID else None,
        "category": f"{expected[:3]}/topic",
        "lang": "ja" if number % 2 else "en",
        "tags": ["twin"] if number % 3 == 0 else [],
    }
    return Record.model_validate(fields | changes)


def make_records(outcomes: Sequence[tuple[str, str]], **changes: object) -> list[Record]:
    return [make_record(e, v, number, **changes) for number, (e, v) in enumerate(outcomes)]


def make_run(records: Sequence[Record], **changes: object) -> RunResult:
    first = records[0]
    fields: dict[str, object] = {
        "backend": first.backend,
        "model": f"{first.backend}-model",
        "model_sha256": first.model_sha256,
        "records": records,
        "cases_per_s": 12.5,
        "wall_s": 3.25,
        "settings": {"threads": 2, "dtype": "float32"},
    }
    return RunResult(**(fields | changes))  # type: ignore[arg-type]


def make_summary(*runs: RunResult, seed: int = 7, n_resamples: int = 200) -> dict[str, object]:
    return build_summary(
        cases=CasesEntry(path="safety.jsonl", sha256="c" * 64, n=len(runs[0].records)),
        runs=runs,
        seed=seed,
        versions={"so8t": "0.1.0", "torch": "2.8.0"},
        machine=MachineEntry(platform="Linux-x86_64", threads=2),
        n_resamples=n_resamples,
    )


def outcome_lists(
    min_size: int = 1, max_size: int = 40
) -> st.SearchStrategy[list[tuple[str, str]]]:
    """Lists of (expected verdict, outcome)."""
    pair = st.tuples(st.sampled_from(OUTCOMES[:3]), st.sampled_from(OUTCOMES))
    return st.lists(pair, min_size=min_size, max_size=max_size)

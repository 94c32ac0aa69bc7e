"""Run one model over cases: all together for verdicts, then one by one for latency."""

import contextlib
import random
import time
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, Generic, NamedTuple, Protocol

import numpy as np

from so8t_eval.backends.judge import Judge, Judged, Prompt, PromptT
from so8t_eval.cases import Case
from so8t_eval.errors import BackendError, So8tError, UnjudgedCaseError
from so8t_eval.judged_records import JudgedRecords
from so8t_eval.labels import INVALID
from so8t_eval.records import Record, RecordWriter, VerdictScores, records_at
from so8t_eval.summary import RunResult

DEFAULT_LATENCY_CASES: Final = 100
DEFAULT_WINDOW_CASES: Final = 1000
_WARM_UP_CALLS: Final = 3
_MOST_FAILURES_IN_A_ROW: Final = 3
"""Cases that may fail one after another before the runtime itself is held to be broken."""


class Progress(Protocol):
    """Where the runner says how far it is."""

    def phase(self, name: str, total: int) -> None:
        """Begin a phase of ``total`` cases."""
        ...

    def advance(self) -> None:
        """One more case of the phase is done."""
        ...


class Silent:
    """Progress that nobody watches."""

    def phase(self, name: str, total: int) -> None:
        """Do nothing."""

    def advance(self) -> None:
        """Do nothing."""


def run_judge(
    judge: Judge[PromptT],
    cases: Sequence[Case],
    *,
    seed: int,
    latency_cases: int = DEFAULT_LATENCY_CASES,
    writer: RecordWriter,
    progress: Progress,
    already_done: Mapping[str, int],
) -> RunResult:
    """As ``run_judge_on_disk``, with the records in memory."""
    result = run_judge_on_disk(
        judge,
        cases,
        seed=seed,
        latency_cases=latency_cases,
        writer=writer,
        progress=progress,
        already_done=already_done,
    )
    return replace(result, records=tuple(result.records))


def run_judge_on_disk(
    judge: Judge[PromptT],
    cases: Sequence[Case],
    *,
    seed: int,
    latency_cases: int = DEFAULT_LATENCY_CASES,
    window_cases: int = DEFAULT_WINDOW_CASES,
    writer: RecordWriter,
    progress: Progress,
    already_done: Mapping[str, int],
) -> RunResult:
    """Judge every case and return its records in the order of ``cases``.

    ``window_cases`` are in memory at a time; of the others nine bytes each. New records are
    appended to ``writer`` as they come, and the records returned are read from its file, which must
    stay as it is meanwhile. ``already_done`` (where a record begins in that file, by content hash)
    are taken over under the case's present id and labels. A case that fails is recorded as invalid.
    Latencies, of a seeded sample, are in the returned records only.

    Raises:
        BackendError: the runtime failed as a whole.
    """
    started = time.perf_counter()
    run = _Run(judge, cases, writer, progress)
    cases_per_s = run.judge_all(already_done, window_cases)
    latencies_ms = run.measure_latency(latency_cases, seed)
    return RunResult(
        backend=judge.info.backend,
        model=judge.info.model,
        model_sha256=judge.info.model_sha256,
        records=JudgedRecords(cases, records_at(writer.path, run.offsets), latencies_ms),
        cases_per_s=cases_per_s,
        wall_s=time.perf_counter() - started,
        settings={**judge.info.settings, "window_cases": window_cases},
    )


@dataclass(frozen=True)
class _Prepared(Generic[PromptT]):
    """A case ready to be judged."""

    place: int
    case: Case
    prompt: PromptT


class _Placed(NamedTuple):
    """A new record and the place of its case."""

    place: int
    record: Record


class _Run(Generic[PromptT]):
    """The state of one run, by place of a case: where its record begins, and if it is valid."""

    def __init__(
        self,
        judge: Judge[PromptT],
        cases: Sequence[Case],
        writer: RecordWriter,
        progress: Progress,
    ) -> None:
        self._judge, self._writer, self._progress = judge, writer, progress
        self._cases = cases
        self._withheld: list[_Placed] = []  # failures in a row: of cases, or of the runtime?
        self.offsets = array("q", bytes(8 * len(cases)))
        self._is_valid = np.zeros(len(cases), dtype=np.bool_)

    def judge_all(self, already_done: Mapping[str, int], window_cases: int) -> float | None:
        """Give every case a record; return new cases per second of judging, None without any."""
        self._progress.phase(self._judge.info.model, len(self._cases))
        n_judged, elapsed = 0, 0.0
        for start in range(0, len(self._cases), window_cases):
            window = list(enumerate(self._cases[start : start + window_cases], start))
            prompts = self._prepared(self._taken_over(window, already_done))
            started = time.perf_counter()
            self._judge_prompts(prompts)
            elapsed += time.perf_counter() - started
            n_judged += len(prompts)
        self._release()
        return n_judged / elapsed if n_judged else None

    def measure_latency(self, n: int, seed: int) -> dict[int, float | None]:
        """Judge a seeded sample one prompt at a time, after warm-up; return the times by place."""
        valid = np.flatnonzero(self._is_valid)
        rng = random.Random(seed)  # noqa: S311 - a sample, not a secret
        sample = [int(valid[i]) for i in rng.sample(range(valid.size), min(n, valid.size))]
        if not sample:
            return {}
        self._progress.phase("latency", len(sample))
        for place in sample[:_WARM_UP_CALLS]:
            self._judge.latency_ms(self._judge.prepare(self._cases[place]))
        latencies_ms = {}
        for place in sample:
            latencies_ms[place] = self._judge.latency_ms(self._judge.prepare(self._cases[place]))
            self._progress.advance()
        return latencies_ms

    def _taken_over(
        self, window: Sequence[tuple[int, Case]], already_done: Mapping[str, int]
    ) -> list[tuple[int, Case]]:
        """Note the records that are there already; return the other cases."""
        missing: list[tuple[int, Case]] = []
        places: list[int] = []
        for place, case in window:
            if (offset := already_done.get(case.content_hash)) is None:
                missing.append((place, case))
            else:
                places.append(place)
                self.offsets[place] = offset
        there = records_at(self._writer.path, [self.offsets[place] for place in places])
        for place, record in zip(places, there, strict=True):
            self._is_valid[place] = record.is_valid
            self._progress.advance()
        return missing

    def _prepared(self, cases: Iterable[tuple[int, Case]]) -> list[_Prepared[PromptT]]:
        """Return the cases that can be asked about, made ready; the others get their record."""
        prepared: list[_Prepared[PromptT]] = []
        for place, case in cases:
            try:
                prepared.append(_Prepared(place, case, self._judge.prepare(case)))
            except So8tError as error:
                self._finish(_Placed(place, self._record(case, None, error)))
        return prepared

    def _judge_prompts(self, prepared: Sequence[_Prepared[PromptT]]) -> None:
        prompts = [entry.prompt for entry in prepared]
        with contextlib.closing(self._judge.judge(prompts)) as outcomes:
            for index, outcome in outcomes:
                of = prepared[index]
                placed = _Placed(of.place, self._record(of.case, of.prompt, outcome))
                if isinstance(outcome, BackendError) and not isinstance(outcome, UnjudgedCaseError):
                    self._withhold(placed, outcome)
                else:
                    self._finish(placed)

    def _record(self, case: Case, prompt: Prompt | None, outcome: Judged | So8tError) -> Record:
        judged = outcome if isinstance(outcome, Judged) else None
        n_tokens = prompt.n_tokens if prompt else None
        return Record(
            id=case.id,
            content_hash=case.content_hash,
            backend=self._judge.info.backend,
            model_sha256=self._judge.info.model_sha256,
            protocol_hash=self._judge.protocol.hash,
            runtime_hash=self._judge.info.runtime_hash,
            expected=case.verdict,
            verdict=judged.verdict if judged else INVALID,
            probabilities=_scores(judged.probabilities) if judged else None,
            logits=_scores(judged.logits) if judged else None,
            n_tokens=judged.n_tokens if judged and n_tokens is None else n_tokens,
            windows=prompt.n_windows if prompt else 1,
            error=None if judged else str(outcome),
            category=case.category,
            lang=case.lang,
            tags=case.tags,
        )

    def _finish(self, placed: _Placed) -> None:
        self._release()
        self._keep(placed)

    def _withhold(self, placed: _Placed, error: BackendError) -> None:
        self._withheld.append(placed)
        if len(self._withheld) >= _MOST_FAILURES_IN_A_ROW:
            raise BackendError(
                f"{self._judge.info.backend} failed on {len(self._withheld)} cases in a row, "
                f"last on {placed.record.id!r}: {error}"
            ) from error

    def _release(self) -> None:
        withheld, self._withheld = self._withheld, []
        for placed in withheld:
            self._keep(placed)

    def _keep(self, placed: _Placed) -> None:
        self.offsets[placed.place] = self._writer.append(placed.record)
        self._is_valid[placed.place] = placed.record.is_valid
        self._progress.advance()


def _scores(scores: tuple[float, float, float] | None) -> VerdictScores | None:
    return None if scores is None else VerdictScores.from_severity_order(scores)

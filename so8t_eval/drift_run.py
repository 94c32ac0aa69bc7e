"""Run the drift ladder: every step on the same cases, and repetitions that change no model."""

import contextlib
import gc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from so8t_eval.atomic_write import atomic_write_text
from so8t_eval.backends.base import Backend, BackendInfo
from so8t_eval.backends.registry import ModelSpec, open_backend
from so8t_eval.backends.token_id_judge import TokenIdJudge
from so8t_eval.cases import Case
from so8t_eval.counted import counted
from so8t_eval.drift import Outcomes
from so8t_eval.drift_ladder import Ladder, floor_step
from so8t_eval.errors import BackendError, So8tError
from so8t_eval.metrics import outcome_codes
from so8t_eval.records import Record, RecordWriter
from so8t_eval.runner import Progress, run_judge
from so8t_eval.scoring_order import ScoringOrder, in_order

RECORDS: Final = "records"
_COMPARED_THREADS: Final = (1, 2)
_OTHER_BATCH_FACTOR: Final = 2


class Scoring(NamedTuple):
    """How cases are scored; ``exact`` is llama.cpp's mode without flash attention, in float32."""

    order: ScoringOrder
    threads: int
    batch_tokens: int | None
    max_prompt_tokens: int
    torch_dtype: str | None = None
    exact: bool = False


class JudgedStep(NamedTuple):
    """One pass of a model over all cases: records and outcomes in case order."""

    name: str
    info: BackendInfo
    records: tuple[Record, ...]
    outcomes: Outcomes


class Repetitions(NamedTuple):
    """Passes of one step that differ in how cases are scored, never in the model.

    The first is the step's own pass, which the ladder compares.
    """

    step: str
    passes: tuple[JudgedStep, ...]


class DriftResult(NamedTuple):
    """Every step's pass in the ladder's order, and repetitions of those that give noise floors."""

    steps: tuple[JudgedStep, ...]
    repetitions: tuple[Repetitions, ...]


def run_drift(
    ladder: Ladder,
    steps: Sequence[str],
    cases: Sequence[Case],
    scoring: Scoring,
    *,
    seed: int,
    progress: Progress,
) -> DriftResult:
    """Judge all cases with every model of the ladder; records go to its ``records`` directory.

    Raises:
        So8tError: what exporting raises, or a model cannot be opened.
        BackendError: a runtime failed as a whole, or a step's tokenizer differs from the first's.
    """
    run = _DriftRun(ladder.directory / RECORDS, cases, scoring, seed, progress)
    judged: list[JudgedStep] = []
    repetitions: list[Repetitions] = []
    for model in ladder.models:
        if floor_step(model.step, steps) == model.step:
            passes = run.repeat(model.step, model.spec)
            repetitions.append(Repetitions(model.step, passes))
            judged.append(passes[0])
        else:
            judged.append(run.judge(model.step, model.spec))
    return DriftResult(tuple(judged), tuple(repetitions))


def outcomes_of(records: Sequence[Record]) -> Outcomes:
    """Return records as arrays; logits are NaN where a record has none."""
    rows = [
        (np.nan,) * 3 if record.logits is None else record.logits.in_severity_order()
        for record in records
    ]
    _, verdicts = outcome_codes(records)
    return Outcomes(np.array(rows, dtype=np.float64).reshape(-1, 3), verdicts)


class _DriftRun:
    """What all passes share: cases, settings, and the first step's token ids and window."""

    def __init__(
        self,
        directory: Path,
        cases: Sequence[Case],
        scoring: Scoring,
        seed: int,
        progress: Progress,
    ) -> None:
        self._directory, self._cases = directory, cases
        self._scoring, self._seed, self._progress = scoring, seed, progress
        self._expected_ids: list[list[int] | None] | None = None
        self._window = scoring.max_prompt_tokens

    def judge(self, step: str, spec: ModelSpec) -> JudgedStep:
        """One pass as the ladder compares it."""
        with self._opened(step, spec, self._scoring) as backend:
            return self._pass(step, step, backend, self._scoring.order)

    def repeat(self, step: str, spec: ModelSpec) -> tuple[JudgedStep, ...]:
        """The same pass, and passes that no difference of the model can tell apart."""
        base = self._scoring
        with self._opened(step, spec, base) as backend:
            first = self._pass(step, step, backend, base.order)
            passes = [first, self._pass(step, "repeated", backend, base.order)]
            if base.order != "single":
                passes.append(self._pass(step, "each alone", backend, "single"))
        batch_tokens = int(first.info.settings["batch_tokens"]) * _OTHER_BATCH_FACTOR
        others = [("shuffled", base._replace(order="shuffled", batch_tokens=batch_tokens))]
        others += [
            (counted(n, "thread"), base._replace(threads=n))
            for n in _COMPARED_THREADS
            if n != base.threads
        ]
        for name, scoring in others:
            with self._opened(step, spec, scoring) as backend:
                passes.append(self._pass(step, name, backend, scoring.order))
        return tuple(passes)

    @contextlib.contextmanager
    def _opened(self, step: str, spec: ModelSpec, scoring: Scoring) -> Iterator[Backend]:
        self._progress.phase(f"{step}: opening", 1)
        backend = _open(spec, scoring)
        self._progress.advance()
        with contextlib.closing(backend):
            self._check_ids(step, backend)
            yield backend
        gc.collect()  # PEFT's modules refer to one another

    def _pass(self, step: str, name: str, backend: Backend, order: ScoringOrder) -> JudgedStep:
        is_own = name == step
        title = step if is_own else f"{step}, {name}"
        path = self._directory / f"{title.replace(', ', '-').replace(' ', '-')}.jsonl"
        ordered = in_order(backend, order, self._seed)
        with RecordWriter(path) as writer:
            records = run_judge(
                TokenIdJudge(ordered, self._window),
                self._cases,
                seed=self._seed,
                latency_cases=0,
                writer=writer,
                progress=_Titled(self._progress, title),
                already_done={},
            ).records
        # Records were appended as they came; the file's order must not depend on the batches.
        atomic_write_text(path, "".join(record.model_dump_json() + "\n" for record in records))
        return JudgedStep(name, ordered.info, tuple(records), outcomes_of(records))

    def _check_ids(self, step: str, backend: Backend) -> None:
        """Every runtime must be asked the same: ids and window of the first step."""
        found = [_prompt_ids(backend, case) for case in self._cases]
        if self._expected_ids is None:
            self._expected_ids = found
            self._window = min(self._window, backend.max_prompt_tokens)
        for case, expected, ids in zip(self._cases, self._expected_ids, found, strict=True):
            if ids != expected:
                raise BackendError(
                    f"step {step}: its tokenizer gives case {case.id!r} other token ids than the "
                    "first step's, so verdicts would not be comparable; leave the step out with "
                    "--steps, or train on another base"
                )


class _Titled:
    """Progress whose phases carry the step's name instead of the model file's."""

    def __init__(self, progress: Progress, title: str) -> None:
        self._progress, self._title = progress, title

    def phase(self, _name: str, total: int) -> None:
        self._progress.phase(self._title, total)

    def advance(self) -> None:
        self._progress.advance()


def _open(spec: ModelSpec, scoring: Scoring) -> Backend:
    if spec.prefix == "llamacpp" and scoring.exact:
        from so8t_eval.backends.llamacpp import LlamaCppBackend

        return LlamaCppBackend(
            spec.path,
            threads=scoring.threads,
            batch_tokens=scoring.batch_tokens,
            max_prompt_tokens=scoring.max_prompt_tokens,
            exact=True,
        )
    return open_backend(
        spec,
        threads=scoring.threads,
        batch_tokens=scoring.batch_tokens,
        max_prompt_tokens=scoring.max_prompt_tokens,
        torch_dtype=scoring.torch_dtype,
    )


def _prompt_ids(backend: Backend, case: Case) -> list[int] | None:
    """Token ids of a case; None where the protocol cannot render it, which the records tell."""
    try:
        return backend.protocol.prompt_ids(case.conversation, case.policy, backend.tokenize).ids
    except So8tError:
        return None

"""Replay: cases of an earlier corpus learned beside new ones, so that these do not displace it.

Source: rehearsal against catastrophic forgetting, A. Robins, "Catastrophic forgetting, rehearsal and
pseudorehearsal", Connection Science 7 (1995).
"""

from importlib.resources import files
from pathlib import Path
from typing import Final, NamedTuple

from so8t_eval.case_sampling import stratified_sample
from so8t_eval.cases import Case
from so8t_eval.errors import ConfigError
from so8t_train.config import SHIPPED_CORPUS, FitConfig
from so8t_train.training_data import load_training_cases

REPLAYED: Final = "replay/"
"""How ids of replayed cases begin."""


class FitCases(NamedTuple):
    """What a fit learns from: its own cases, then the replayed ones."""

    cases: list[Case]
    n_replayed: int


def shipped_corpus() -> Path:
    """The training file that comes with the package."""
    return Path(str(files("so8t_train") / "data" / "train.jsonl"))


def load_fit_cases(config: FitConfig) -> FitCases:
    """The training cases of ``config``, and the cases drawn from its ``replay_file``.

    A draw keeps the file's shares of the verdicts and depends on ``seed``. Cases whose conversation
    and policy stand in ``train_file`` too are not drawn: there they may have another label. Ids
    of replayed cases begin with ``REPLAYED``.

    Raises:
        CaseFileError: a file is missing or broken, or an id stands in two training files.
        ConfigError: no case of ``replay_file`` can be drawn.
    """
    own = load_training_cases(config.train_file)
    if not config.replay_file:
        return FitCases(own, 0)
    known = {case.content_hash for case in own}
    sources = [shipped_corpus() if f == SHIPPED_CORPUS else f for f in config.replay_file]
    pool = [case for case in load_training_cases(sources) if case.content_hash not in known]
    if not pool:
        raise ConfigError(
            "replay_file: expected cases that are not in train_file, found none; give another "
            "file, or leave replay_file out"
        )
    wanted = len(own) if config.replay_cases is None else config.replay_cases
    drawn = [
        case.model_copy(update={"id": f"{REPLAYED}{case.id}"})
        for case in stratified_sample(pool, wanted, config.seed)
    ]
    return FitCases([*own, *drawn], len(drawn))

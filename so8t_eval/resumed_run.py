"""What ``--resume`` may not do: drop finished records that the command does not cover."""

from collections.abc import Iterable, Sequence

from so8t_eval.backends.judge import Model
from so8t_eval.cases import Case
from so8t_eval.errors import UsageError
from so8t_eval.line_sequence import LineSequence
from so8t_eval.records import Record


def check_nothing_is_dropped(
    records: LineSequence[Record], models: Sequence[Model], cases: Iterable[Case]
) -> None:
    """Check that every finished record is of these models, and of one of these cases.

    A case is known by its content or by its id, so that labels, ids and texts may be corrected.

    Raises:
        UsageError: some records are not; they would be gone from the file at the end of the run.
    """
    if not records:
        return
    judged = {(model.info.backend, model.info.model_sha256) for model in models}
    strange = [record for record in records if (record.backend, record.model_sha256) not in judged]
    if strange:
        first = f"{strange[0].backend} {strange[0].model_sha256[:12]}"
        raise _would_drop(records, strange, "models", first, "every --model")
    unseen_ids = {record.id for record in records}
    unseen_hashes = {record.content_hash for record in records}
    for case in cases:
        unseen_ids.discard(case.id)
        unseen_hashes.discard(case.content_hash)
    strange = [
        record
        for record in records
        if record.id in unseen_ids and record.content_hash in unseen_hashes
    ]
    if strange:
        options = "the case file, --limit and --seed"
        raise _would_drop(records, strange, "cases", repr(strange[0].id), options)


def _would_drop(
    records: LineSequence[Record], strange: Sequence[Record], what: str, first: str, options: str
) -> UsageError:
    n = f"{len(strange)} record{'s' if len(strange) > 1 else ''}"
    return UsageError(
        f"{records.path}: found {n} of other {what} (such as {first}), which this command would "
        f"drop; give {options} of the run to be resumed, or another --log-dir"
    )

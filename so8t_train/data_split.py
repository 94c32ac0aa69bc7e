"""Split a case file into training and dev cases that do not resemble one another."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

from so8t_eval.atomic_write import atomic_path
from so8t_eval.case_sampling import proportional_quotas
from so8t_eval.cases import Case
from so8t_eval.counted import counted
from so8t_eval.errors import DiskError, So8tError, UsageError
from so8t_train.case_groups import CaseGroups, group_cases, near_duplicate_links, twin_links
from so8t_train.case_strata import (
    Stratum,
    check_targets,
    count_strata,
    missing_verdicts,
    read_source,
    strata_of,
    write_lines,
)
from so8t_train.group_draw import draw_groups, kinds_of

TRAIN_FILE: Final = "train.jsonl"
DEV_FILE: Final = "dev.jsonl"


class Split(NamedTuple):
    """Places of the cases of each side, in file order, and the groups that were kept whole."""

    train: tuple[int, ...]
    dev: tuple[int, ...]
    groups: CaseGroups


@dataclass(frozen=True)
class SplitResult:
    """What was written. ``strata`` has the number of cases and, of them, of dev cases."""

    train_file: Path
    dev_file: Path
    n_train: int
    n_dev: int
    strata: dict[Stratum, tuple[int, int]]
    n_groups: int
    largest_group: int
    twin_pairs: int
    near_duplicate_pairs: int
    warnings: tuple[str, ...]

    @property
    def dev_share(self) -> float:
        """Share of the cases that are dev cases."""
        return self.n_dev / (self.n_train + self.n_dev)


def split_file(
    source: Path, directory: Path, *, dev_share: float, seed: int, force: bool = False
) -> SplitResult:
    """Write ``train.jsonl`` and ``dev.jsonl`` into a directory: both, or neither.

    Lines are copied as they are. What was written is read back and checked before it is put in
    place: every case once, no twin pair and no near-duplicate pair across.

    Raises:
        CaseFileError: the source is no case file.
        UsageError: a target is in the way, or the cases cannot be separated.
        DiskError: a file could not be written or read back.
    """
    train_file, dev_file = directory / TRAIN_FILE, directory / DEV_FILE
    check_targets(source, [train_file, dev_file], force=force)
    file = read_source(source)
    split = split_cases(file.cases, dev_share, seed)
    with atomic_path(train_file) as train, atomic_path(dev_file) as dev:
        write_lines(file, split.train, train)
        write_lines(file, split.dev, dev)
        check_apart(file.cases, split)
        # Should the second rename fail, one file is missing: never a new one beside an old one.
        _remove(train_file)
    train_cases, dev_cases = (
        [file.cases[place] for place in places] for places in (split.train, split.dev)
    )
    all_counts, dev_counts = count_strata(file.cases), count_strata(dev_cases)
    return SplitResult(
        train_file,
        dev_file,
        len(train_cases),
        len(dev_cases),
        {stratum: (all_counts[stratum], dev_counts[stratum]) for stratum in strata_of(file.cases)},
        len(split.groups.groups),
        max(map(len, split.groups.groups)),
        len(split.groups.twins),
        len(split.groups.near_duplicates),
        tuple(_warnings(train_cases, dev_cases, split.groups)),
    )


def split_cases(cases: Sequence[Case], dev_share: float, seed: int) -> Split:
    """Draw dev cases by whole groups, in proportion to verdicts and languages.

    Raises:
        UsageError: the groups are too large to leave cases on both sides.
    """
    groups = group_cases(cases, near_duplicates_too=True)
    strata = strata_of(cases)
    place_of = {stratum: place for place, stratum in enumerate(strata)}
    stratum_of = [place_of[Stratum(case.verdict, case.lang)] for case in cases]
    kinds = kinds_of(groups.groups, stratum_of, len(strata))
    counts = count_strata(cases)
    quotas = _dev_quotas([counts[stratum] for stratum in strata], dev_share)
    drawn = draw_groups(kinds, quotas, seed) or []
    dev = sorted(case for group in drawn for case in groups.groups[group])
    if not 0 < len(dev) < len(cases):
        raise UsageError(_inseparable(groups, len(cases), dev_share))
    chosen = set(dev)
    train = tuple(place for place in range(len(cases)) if place not in chosen)
    return Split(train, tuple(dev), groups)


def check_apart(cases: Sequence[Case], split: Split) -> None:
    """Raise So8tError unless every case is on one side and no pair that belongs together is parted.

    The links are looked for anew, among all cases.
    """
    if sorted([*split.train, *split.dev]) != list(range(len(cases))):
        raise So8tError("the split lost or repeated a case; nothing was written, report this fault")
    in_dev = set(split.dev)
    for link in (*twin_links(cases), *near_duplicate_links(cases)):
        if (link.first in in_dev) != (link.second in in_dev):
            first, second = cases[link.first].id, cases[link.second].id
            raise So8tError(
                f"the split parted {first!r} and {second!r}; nothing was written, report this fault"
            )


def _dev_quotas(sizes: Sequence[int], dev_share: float) -> list[int]:
    """Dev cases per stratum; one that has a single case leaves it to training, if any has more."""
    several = [size if size > 1 else 0 for size in sizes]
    usable = several if any(several) else list(sizes)
    total = max(1, round(dev_share * sum(sizes)))
    places = [place for place, size in enumerate(usable) if size]
    quotas = [0] * len(sizes)
    n = min(total, sum(usable))
    for place, quota in zip(
        places, proportional_quotas([usable[place] for place in places], n), strict=True
    ):
        quotas[place] = quota
    return quotas


def _inseparable(groups: CaseGroups, n: int, dev_share: float) -> str:
    sizes = sorted(map(len, groups.groups))
    return (
        f"{n} cases in {len(sizes)} groups of near-duplicates and twins (smallest {sizes[0]}, "
        f"largest {sizes[-1]}) leave no way to put {dev_share:g} of them on the dev side without "
        "parting a group; add cases, change --dev, or move system text that all cases share from "
        "messages to policy, which does not count"
    )


def _warnings(train: Sequence[Case], dev: Sequence[Case], groups: CaseGroups) -> Iterator[str]:
    for name, cases in (("training", train), ("dev", dev)):
        missing = [verdict.value for verdict in missing_verdicts(cases)]
        if missing:
            yield f"no {name} case with verdict {', '.join(missing)}"
    if groups.unlinked_twins:
        shown = ", ".join(groups.unlinked_twins[:5])
        yield (
            f"{counted(len(groups.unlinked_twins), 'case')} tagged twin without a partner in this "
            f"file, so they may be parted from it: {shown}"
        )


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise DiskError(f"cannot replace {path}: {error.strerror or error}") from error

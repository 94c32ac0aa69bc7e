"""Seeded samples of cases that keep the proportions of the verdicts."""

import random
from collections.abc import Sequence

from so8t_eval.cases import Case
from so8t_eval.labels import SEVERITY_ORDER, Verdict


def stratified_sample(cases: Sequence[Case], n: int, seed: int) -> list[Case]:
    """Return ``n`` cases (all, if there are fewer) in their original order.

    Verdicts keep their shares to within one case, and none that occurs is left out when ``n``
    allows. The same seed and cases give the same sample.
    """
    return [cases[i] for i in sampled_places([case.verdict for case in cases], n, seed)]


def sampled_places(verdicts: Sequence[Verdict], n: int, seed: int) -> list[int]:
    """Return the places of the cases that ``stratified_sample`` takes, given their verdicts."""
    if n >= len(verdicts):
        return list(range(len(verdicts)))
    rng = random.Random(seed)  # noqa: S311 - a sample, not a secret
    strata = [
        stratum
        for wanted in SEVERITY_ORDER
        if (stratum := [i for i, verdict in enumerate(verdicts) if verdict == wanted])
    ]
    quotas = proportional_quotas([len(stratum) for stratum in strata], n)
    return sorted(
        i for stratum, quota in zip(strata, quotas, strict=True) for i in rng.sample(stratum, quota)
    )


def proportional_quotas(sizes: Sequence[int], n: int) -> list[int]:
    """Return largest-remainder shares of ``n`` (at most the sum), one each when ``n`` allows."""
    least = 1 if n >= len(sizes) else 0
    exact = [size * n / sum(sizes) for size in sizes]
    quotas = [min(size, max(least, int(share))) for size, share in zip(sizes, exact, strict=True)]
    while sum(quotas) != n:
        step = 1 if sum(quotas) < n else -1
        open_to_step = [
            i for i, quota in enumerate(quotas) if (quota < sizes[i] if step > 0 else quota > least)
        ]
        quotas[max(open_to_step, key=lambda i: step * (exact[i] - quotas[i]))] += step
    return quotas

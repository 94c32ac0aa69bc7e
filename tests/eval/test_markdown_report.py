import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from record_builders import make_record, make_records, make_run, make_summary

from so8t_eval.errors import UsageError
from so8t_eval.markdown_report import CASES_LISTED, escape_markdown, render_report_md

GOLDEN = Path(__file__).parent / "golden" / "report.md"
OUTCOMES = [
    *[("refuse", "refuse")] * 6,
    *[("refuse", "allow")] * 2,
    *[("allow", "allow")] * 7,
    ("allow", "escalate"),
    ("allow", "invalid"),
    *[("escalate", "escalate")] * 3,
]


def golden_summary():
    second = [("refuse", "allow"), ("refuse", "escalate"), *OUTCOMES[2:-1], ("escalate", "refuse")]
    return make_summary(
        make_run(make_records(OUTCOMES), cases_per_s=None),
        make_run(
            make_records(second, backend="llama.cpp", model_sha256="b" * 64, windows=2),
            model="model_Q8_0.gguf",
        ),
    )


def tables(report):
    return re.findall(r"(?:^\|.*\|\n)+", report, flags=re.MULTILINE)


def cells(row):
    return re.split(r"(?<!\\)\|", row.strip())[1:-1]


def test_report_equals_the_golden_file():
    """After an intended change: write ``render_report_md(golden_summary())`` to the golden file."""
    assert render_report_md(golden_summary()) == GOLDEN.read_text(encoding="utf-8")


def test_every_table_row_has_as_many_cells_as_its_header():
    found = tables(render_report_md(golden_summary()))
    assert len(found) >= 8
    for table in found:
        assert len({len(cells(row)) for row in table.splitlines()}) == 1


def test_all_flips_are_listed():
    outcomes = [("refuse", "refuse")] * 60
    flipped = make_records([("refuse", "allow")] * 60, backend="llama.cpp")
    report = render_report_md(make_summary(make_run(make_records(outcomes)), make_run(flipped)))
    assert report.count("| refuse → allow |") == 60
    assert "case-059" in report


def test_of_very_many_flips_and_errors_the_rest_is_counted():
    n = CASES_LISTED + 5
    outcomes = make_records([("refuse", "refuse")] * n)
    lost = make_records([("refuse", "invalid")] * n, backend="llama.cpp")
    report = render_report_md(make_summary(make_run(outcomes), make_run(lost)))
    flips, errors = (part for part in report.split("\n## ") if "And 5 more" in part)
    assert flips.count("| refuse → invalid |") == CASES_LISTED
    assert errors.startswith("Cases without a verdict")
    assert errors.count("| run 2 |") == CASES_LISTED
    assert "And" not in report.replace("And 5 more, listed in summary.json.", "")


def test_one_run_has_no_agreement_section():
    report = render_report_md(make_summary(make_run(make_records(OUTCOMES))))
    assert "## Agreement" not in report
    assert "## Results" in report


def test_undefined_figures_say_so():
    report = render_report_md(make_summary(make_run([make_record("allow", "allow")])))
    assert "| Refuse Recall | undefined (n=0) |" in report
    assert "| Latency p50 / p95 / p99 | 10.0 / 10.0 / 10.0 ms |" in report


def test_hostile_text_stays_in_its_cell():
    hostile = "a|b`c`<script>\n| x |\r\n# h [l](u) \x1b[31m \u202eevil"
    run = make_run([make_record("allow", "invalid", id=hostile, category=hostile, error=hostile)])
    report = render_report_md(make_summary(run))
    assert "<script>" not in report
    assert "\x1b" not in report
    assert "\u202e" not in report
    assert "a\\|b\\`c\\`&lt;script&gt; \\| x \\| \\# h" in report
    for table in tables(report):
        assert len({len(cells(row)) for row in table.splitlines()}) == 1


@settings(deadline=None, max_examples=200)
@given(st.text())
def test_escaped_text_is_one_line_without_bare_markup(text):
    escaped = escape_markdown(text)
    assert len(escaped.splitlines()) <= 1
    assert "<" not in escaped
    assert ">" not in escaped
    assert not re.search(r"(?<!\\)(?:\\\\)*[|`*_]", escaped)


def test_plain_text_is_left_alone():
    assert escape_markdown("ref/cyber-012 日本語") == "ref/cyber-012 日本語"


def test_a_wrong_summary_is_an_error():
    with pytest.raises(UsageError, match="summary: "):
        render_report_md({"schema_version": 1})

import re
from collections.abc import Sequence
from itertools import pairwise, product

import pytest
from record_builders import make_record, make_records, make_run, make_scores, make_summary
from support.parsed_html import Element, case_data, parse_html

from so8t_eval.html_report import FLIPS_LISTED, render_report_html
from so8t_eval.metrics import METRIC_LABELS
from so8t_eval.records import Record
from so8t_eval.report_cases import LONGEST_TEXT, script_json
from so8t_eval.report_input import ReportInput
from so8t_eval.summary_schema import IntervalEntry, parse_summary

OUTCOMES = [
    *[("refuse", "refuse")] * 6,
    *[("refuse", "allow")] * 2,
    *[("allow", "allow")] * 7,
    ("allow", "escalate"),
    ("allow", "invalid"),
    *[("escalate", "escalate")] * 3,
]
SECOND = [("refuse", "allow"), ("refuse", "escalate"), *OUTCOMES[2:-1], ("escalate", "refuse")]
HOSTILE = "</script><script>alert(1)</script>\x00\u2028\u2029\ud800\u202e & \"' ]]> <!-- {{ 7*7 }}"


def make_input(*runs: Sequence[Record], notes: tuple[str, ...] = ()) -> ReportInput:
    summary = make_summary(*map(make_run, runs))
    return ReportInput(parse_summary(summary), tuple(map(tuple, runs)), notes)


def two_runs() -> ReportInput:
    return make_input(
        make_records(OUTCOMES), make_records(SECOND, backend="llamacpp", model_sha256="b" * 64)
    )


def render(data: ReportInput, text: str = "some prompt") -> str:
    return render_report_html(data, lambda record: f"{text} {record.id}")


def parsed(data: ReportInput, text: str = "some prompt") -> Element:
    return parse_html(render(data, text))


def shown_interval(element: Element) -> IntervalEntry:
    """The figures an element shows, exactly."""
    (data,) = element.all("data")
    value, low, high = (data.attributes[name] for name in ("value", "data-low", "data-high"))
    return IntervalEntry(
        value=float(value),
        low=float(low) if low else None,
        high=float(high) if high else None,
        n=int(data.attributes["data-n"]),
    )


def test_cards_show_exactly_the_figures_of_the_summary() -> None:
    data = two_runs()
    document = parsed(data)
    cards = document.all("article")
    assert [card.attributes["data-metric"] for card in cards] == list(METRIC_LABELS)
    for card, (index, run) in product(cards, enumerate(data.summary.runs)):
        figure = getattr(run.metrics, card.attributes["data-metric"])
        line = card.one("div", data_run=str(index))
        assert shown_interval(line) == figure
        assert str(figure) in line.words


def test_slices_and_agreement_show_exactly_the_figures_of_the_summary() -> None:
    data = two_runs()
    document = parsed(data)
    tables = document.all("table", class_="sortable slices")
    dimensions = ("lang", "tag", "category")
    assert len(tables) == len(dimensions)
    for table, dimension in zip(tables, dimensions, strict=True):
        rows = iter(table.one("tbody").all("tr"))
        for name, entries in sorted(data.summary.slices[dimension].items()):
            for number, entry in enumerate(entries, start=1):
                row = next(rows)
                title, run, n, *figures = row.children
                assert (title.words, run.words, n.words) == (name, str(number), str(entry.n))
                for cell, key in zip(
                    figures,
                    ("accuracy", "refuse_recall", "unsafe_allow_rate", "over_refusal_rate"),
                    strict=True,
                ):
                    figure = getattr(entry, key)
                    if figure.value is None:
                        assert re.fullmatch("– no (refuse|allow) cases", cell.words)
                        assert cell.all("data") == []
                    else:
                        assert shown_interval(cell) == figure
    comparison = data.summary.comparison
    assert comparison is not None
    (row,) = document.one("div", aria_label="Agreement with run 1").one("tbody").all("tr")
    assert shown_interval(row) == comparison.agreement
    assert row.children[-1].words == str(len(comparison.flips)) == "3"


def test_confusion_shows_the_counts() -> None:
    data = two_runs()
    tables = parsed(data).all("table", class_="confusion")
    for table, run in zip(tables, data.summary.runs, strict=True):
        for row, (expected, counts) in zip(
            table.one("tbody").all("tr"), run.confusion.rows().items(), strict=True
        ):
            assert row.children[0].words == expected
            assert [int(b.words) for b in row.all("b")] == list(counts)
            assert row.children[-1].words == str(sum(counts))
    unsafe = tables[0].one("td", class_="unsafe shade-2")
    assert unsafe.words == "2 25 % unsafe allow"


def test_undefined_is_a_dash_with_its_reason_and_never_zero() -> None:
    document = parsed(make_input([make_record("allow", "allow", tags=[])]))
    for key, reason in (
        ("refuse_recall", "no refuse cases"),
        ("unsafe_allow_rate", "no refuse cases"),
        ("escalate_precision", "no escalate verdicts"),
        ("macro_f1", "a verdict is neither expected nor given"),
    ):
        card = document.one("article", data_metric=key)
        assert f"– {reason}" in card.words
        assert card.all("data") == []
        assert card.all("svg", class_="strip") == []
    assert "[no interval]" in document.one("article", data_metric="ece").words
    operating = next(f for f in document.all("figure") if "Operating points" in f.words)
    assert "Undefined: no refuse cases, or no allow cases." in operating.words
    assert operating.all("svg", class_="chart") == []
    assert [e for e in document.all("h3") if e.words == "Tag"] == []


def test_a_run_without_any_verdict_is_shown_as_such() -> None:
    document = parsed(make_input(make_records([("allow", "invalid"), ("refuse", "invalid")])))
    words = document.one("main").words
    assert "Undefined: no case has a verdict with probabilities." in words
    assert "Not measured." in words
    assert "Cases without a verdict, Run 1: torch: 2" in words
    assert "case-001: backend stopped" in words
    assert [row[7] for row in case_data(document)["cases"]] == [
        [["invalid", None, None, None, None]]
    ] * 2


def test_an_unmeasured_latency_is_no_zero() -> None:
    records = [r.model_copy(update={"latency_ms": None}) for r in make_records(OUTCOMES)]
    figure = next(f for f in parsed(make_input(records)).all("figure") if "Latency" in f.words)
    assert figure.words.count("– not measured") == 3


def test_header_names_models_hashes_seed_n_and_versions() -> None:
    data = two_runs()
    document = parsed(data)
    words = document.one("main").words
    facts = dict(zip(document.all("dt"), document.all("dd"), strict=True))
    seed = next(value for name, value in facts.items() if name.words == "Seed")
    assert seed.words == "7"
    for run in data.summary.runs:
        for fact in (run.backend, run.model, run.model_sha256, run.protocol_hash):
            assert fact in words
    assert "n=20" in words
    assert "so8t 0.1.0, torch 2.8.0" in words
    assert "Linux-x86_64, threads: 2" in words
    assert data.summary.cases.sha256 in words
    assert "dtype=float32, threads=2" in words


def test_flips_come_first_then_errors() -> None:
    data = case_data(parsed(two_runs()))
    assert data["runs"] == ["Run 1: torch", "Run 2: llamacpp"]
    flags = [row[6] for row in data["cases"]]
    assert flags == ["fuw", "fw", "fw", "uw", "uw", "nw", "w", *[""] * 13]
    first = data["cases"][0]
    assert first[:5] == ["case-000", "some prompt case-000", "refuse", "ref/topic", "en"]
    assert first[5] == ["twin"]
    assert first[7] == [["refuse", 0.1, 0.1, 0.8, 0.7], ["allow", 0.8, 0.1, 0.1, 0.7]]


def test_of_the_wrong_ones_the_surest_comes_first() -> None:
    records = [
        make_record("refuse", "allow", n, probabilities=make_scores("allow", top))
        for n, top in enumerate((0.5, 0.9, 0.7))
    ]
    rows = case_data(parsed(make_input(records)))["cases"]
    assert [row[0] for row in rows] == ["case-001", "case-002", "case-000"]


def test_hostile_text_stays_text() -> None:
    hostile = HOSTILE.replace("\ud800", "")  # no record holds a lone surrogate
    records = [
        make_record("allow", "allow", id=hostile, category=hostile, lang=hostile, tags=[hostile]),
        make_record("refuse", "invalid", 1, error=hostile),
    ]
    flipped = [
        make_record("allow", "refuse", id=hostile, category=hostile, lang=hostile, tags=[hostile]),
        make_record("refuse", "invalid", 1, error=hostile),
    ]
    data = make_input(records, flipped, notes=(HOSTILE,))
    html = render_report_html(data, lambda _: HOSTILE)
    html.encode("utf-8")
    for char in "\x00\u2028\u2029\ud800\u202e":
        assert char not in html
    assert "<script>alert" not in html
    document = parse_html(html)
    assert len(document.all("script")) == 2
    shown = "</script><script>alert(1)</script>⟨U+0000⟩⟨U+2028⟩⟨U+2029⟩⟨U+D800⟩⟨U+202E⟩ & \"' ]]>"
    assert shown.replace("⟨U+D800⟩", "") in document.one("main").words
    assert shown in document.one("main").all("p", class_="note")[0].text
    assert case_data(document)["cases"][0][1].startswith(shown)
    assert "{{ 7*7 }}" in document.one("main").words


@pytest.mark.parametrize("text", ["</script>", "<!--", "a&b", "\u2028\u2029", "日本語", '"\\'])
def test_script_json_holds_the_same_and_no_markup(text: str) -> None:
    import json

    written = script_json([text])
    assert json.loads(written) == [text]
    assert not re.search("[<>&\u2028\u2029]", written)


def test_long_texts_are_cut_and_unknown_ones_said_to_be() -> None:
    data = make_input([make_record("allow", "allow")])
    document = parse_html(render_report_html(data, lambda _: "x" * (LONGEST_TEXT + 5)))
    text = case_data(document)["cases"][0][1]
    assert text == "x" * LONGEST_TEXT + " … (5 more characters)"
    document = parse_html(render_report_html(data, lambda _: None))
    assert case_data(document)["cases"][0][1] is None


def test_the_page_loads_nothing() -> None:
    html = render(two_runs())
    assert not re.search(r"https?:|//\w+\.|@import|url\(|\bsrc=|srcset", html)
    document = parse_html(html)
    assert document.all("link") == document.all("img") == document.all("iframe") == []
    policy = document.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert all(a.attributes["href"].startswith("#") for a in document.all("a"))
    assert [e.tag for e in document.all() if "style" in e.attributes] == []
    assert [e.tag for e in document.all() if any(a.startswith("on") for a in e.attributes)] == []


def test_the_policy_names_the_style_and_script_that_are_there() -> None:
    import base64
    import hashlib

    document = parsed(two_runs())
    policy = document.one("meta", http_equiv="Content-Security-Policy").attributes["content"]
    script = document.all("script")[-1]
    for text in (script.text, document.one("style").text):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"'sha256-{digest}'" in policy


def test_every_reference_inside_the_page_leads_somewhere() -> None:
    document = parsed(two_runs())
    ids = [e.attributes["id"] for e in document.all() if "id" in e.attributes]
    assert len(ids) == len(set(ids))
    wanted = [a.attributes["href"].removeprefix("#") for a in document.all("a")]
    wanted += [label.attributes["for"] for label in document.all("label")]
    for element in document.all():
        wanted += element.attributes.get("aria-labelledby", "").split()
    assert set(wanted) - set(ids) == set()


def test_every_chart_has_a_title_axis_labels_words_and_numbers() -> None:
    figures = parsed(two_runs()).all("figure")
    assert len(figures) == 5
    for figure in figures:
        chart = figure.one("svg", class_="chart")
        assert chart.attributes["role"] == "img"
        assert chart.one("title").words == figure.one("h3").words
        assert re.search(r"\d", chart.one("desc").words)
        labels = [label.words for label in chart.all("text", class_="label")]
        assert len(labels) >= 2
        assert all(labels)
        assert len(figure.one("table").one("tbody").all("tr")) >= 2
    bins = figures[0]
    counts = [t.words for t in bins.all("text", class_="count")]
    rows = bins.one("table").one("tbody").all("tr")
    assert [row.children[1].words for row in rows if row.children[1].words != "0"] == counts
    assert len(rows) == 15


def test_controls_have_labels_and_tables_have_header_cells() -> None:
    document = parsed(two_runs())
    labelled = {label.attributes["for"] for label in document.all("label")}
    controls = [*document.all("select"), *document.all("input")]
    assert len(controls) >= 9
    assert {control.attributes["id"] for control in controls} <= labelled
    for table in document.all("table"):
        assert table.one("thead").all("th", scope="col")
    for region in document.all("div", class_="scroll"):
        assert region.attributes["tabindex"] == "0"
        assert region.attributes["aria-label"]
    assert document.one("a", class_="skip").attributes["href"] == "#main"
    assert document.one("noscript").words.startswith("The case table is filled by JavaScript")


def test_headings_go_down_one_level_at_a_time() -> None:
    levels = [int(e.tag[1]) for e in parsed(two_runs()).all() if re.fullmatch("h[1-6]", e.tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))


def test_one_run_has_no_agreement_and_many_have_one_line_each() -> None:
    records = make_records(OUTCOMES)
    assert "Agreement" not in parsed(make_input(records)).one("body").words
    runs = [make_records(OUTCOMES, model_sha256=c * 64) for c in "abcdef"]
    document = parsed(make_input(*runs))
    rows = document.one("div", aria_label="Agreement with run 1").one("tbody").all("tr")
    assert [row.children[-1].words for row in rows] == ["0"] * 5
    assert "No flips." in document.one("main").words


def test_many_flips_are_listed_in_part_and_are_all_in_the_case_table() -> None:
    n = FLIPS_LISTED + 10
    data = make_input(
        make_records([("refuse", "refuse")] * n),
        make_records([("refuse", "allow")] * n, backend="llamacpp"),
    )
    document = parsed(data)
    table = document.one("div", aria_label="Flips").one("table")
    caption = table.one("caption").words
    assert f"the first {FLIPS_LISTED} of {n}; the case table has all" in caption
    assert len(table.one("tbody").all("tr")) == FLIPS_LISTED
    assert [row[6] for row in case_data(document)["cases"]] == ["fuw"] * n


def test_the_case_table_is_cut_after_the_worst_and_says_so() -> None:
    wanted = [("refuse", "refuse")] * 3 + [("allow", "refuse")] * 4 + [("allow", "allow")] * 5
    got = [("refuse", "allow")] * 3 + wanted[3:]
    data = make_input(make_records(wanted), make_records(got, backend="llamacpp"))

    def shown(n: int) -> tuple[list[str], str]:
        document = parse_html(render_report_html(data, lambda _: None, table_cases=n))
        return [row[6] for row in case_data(document)["cases"]], document.one("main").words

    everything, without_note = shown(12)
    assert everything == ["fuw"] * 3 + ["w"] * 4 + [""] * 5
    assert "leaves out" not in without_note
    for n, left_out in (
        (5, "0 flips, 2 other wrong and 5 right ones"),
        (2, "1 flips, 4 other wrong and 5 right ones"),
        (0, "3 flips, 4 other wrong and 5 right ones"),
    ):
        rows, words = shown(n)
        assert rows == everything[:n]
        assert f"the first {n} of 12 cases" in words
        assert f"It leaves out {left_out}" in words
        assert "so8t-eval report --table-cases 12 puts all of them in" in words


def test_different_protocols_and_redaction_are_said() -> None:
    records = make_records(OUTCOMES)
    data = make_input(records, make_records(OUTCOMES, protocol_hash="q" * 64, backend="llamacpp"))
    assert "used different protocols" in parsed(data).one("main").words
    html = render_report_html(data, lambda _: "hmac", redaction_key="0123456789ab")
    assert "HMAC-SHA-256, key 0123456789ab" in parse_html(html).one("main").words


def test_equal_input_gives_equal_bytes() -> None:
    assert render(two_runs()) == render(two_runs())


COLOUR = re.compile(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)")


def contrast(a: str, b: str) -> float:
    """WCAG 2.2 contrast ratio of two colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


@pytest.mark.parametrize("theme", [1, 2], ids=["light", "dark"])
def test_colours_can_be_told_apart(theme: int) -> None:
    style = parsed(two_runs()).one("style").text
    colours = {match[1]: match[theme + 1] for match in COLOUR.finditer(style)}
    text = [
        *product(("text", "muted", "link", "bad", "good"), ("page", "surface")),
        *product(("text",), ("note", *(f"shade-{i}" for i in range(1, 6)))),
    ]
    graphics = product(
        ("control", "focus", "bar", "good", "bad", *(f"run-{i}" for i in range(4))), ("surface",)
    )
    for pairs, least in ((text, 4.5), (graphics, 3.0)):
        for front, back in pairs:
            ratio = contrast(colours[front], colours[back])
            assert ratio >= least, f"{front} on {back}: {ratio:.2f}"

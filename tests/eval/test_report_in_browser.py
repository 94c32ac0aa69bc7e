"""The report in a real browser: it fills its table, sorts, filters, and logs no error."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from record_builders import make_records
from support.case_files import case_dict, write_cases
from support.parsed_html import Element, parse_html
from support.run_files import write_run

from so8t_eval.cases import load_cases
from so8t_eval.html_report import render_report_html
from so8t_eval.report_input import CaseTexts, ReportInput, read_case_texts, read_report_input

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for name in BROWSERS if (path := shutil.which(name))), None)
N_CASES = 120
HOSTILE = "<img src=x onerror=alert(1)><script>alert(2)</script>"

pytestmark = pytest.mark.skipif(
    BROWSER is None, reason=f"needs a Chromium: none of {', '.join(BROWSERS)} is installed"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> tuple[ReportInput, CaseTexts]:
    directory = tmp_path_factory.mktemp("run")
    cases = [case_dict(i, lang="ja" if i % 4 == 0 else "en") for i in range(N_CASES)]
    cases[0]["prompt"] = HOSTILE
    path = write_cases(directory / "cases.jsonl", cases)
    loaded = load_cases(path)
    models = []
    for backend, wrong in (("torch", 10), ("llamacpp", 15)):
        outcomes = [
            (c.verdict.value, "allow" if i % wrong == 2 else c.verdict.value)
            for i, c in enumerate(loaded)
        ]
        models.append(
            [
                r.model_copy(update={"id": c.id, "content_hash": c.content_hash, "lang": c.lang})
                for r, c in zip(make_records(outcomes, backend=backend), loaded, strict=True)
            ]
        )
    run = write_run(directory / "run", *models, cases_path=str(path))
    data = read_report_input([run])
    return data, read_case_texts(data.summary, data.records[0], None)


@pytest.fixture
def html(data: tuple[ReportInput, CaseTexts]) -> str:
    report, texts = data
    return render_report_html(report, texts.of)


def browse(html: str, directory: Path, *options: str) -> tuple[Element, str]:
    """Open a page, and return the document after its script has run, and what was logged."""
    page = directory / "report.html"
    page.write_text(html, encoding="utf-8")
    command = [
        str(BROWSER), "--headless", "--disable-gpu", "--no-sandbox", "--disable-dev-shm-usage",
        f"--user-data-dir={directory / 'profile'}", "--enable-logging=stderr",
        "--virtual-time-budget=5000", *options, "--dump-dom", page.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=90)
    assert done.returncode == 0, done.stderr
    logged = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return parse_html(done.stdout), logged


def scripted(html: str, script: str) -> str:
    """The page with one more script, whose result is left in ``data-result`` of the body.

    The content security policy would refuse it, so it goes.
    """
    page = re.sub('<meta http-equiv="Content-Security-Policy"[^>]*>', "", html)
    assert page != html
    call = f"(async () => {{ document.body.dataset.result = JSON.stringify(await (async () => {{ {script} }})()); }})();"  # noqa: E501
    return page.replace("</body>", f"<script>{call}</script></body>")


HELPERS = """
const $ = (id) => document.getElementById(id);
const ids = () => [...document.querySelectorAll("#case-table tbody")].map(b => b.rows[0].cells[0].textContent);
const status = () => $("case-status").textContent;
const pick = (id, value) => { $(id).value = value; $(id).dispatchEvent(new Event("change", {bubbles: true})); };
const header = (key) => document.querySelector(`#case-table th[data-key="${key}"]`);
const sort = (key) => header(key).querySelector("button").click();
const later = (ms) => new Promise(done => setTimeout(done, ms));
"""  # noqa: E501


def result_of(html: str, directory: Path, script: str) -> dict[str, object]:
    document, logged = browse(scripted(html, HELPERS + script), directory)
    assert logged == ""
    result: dict[str, object] = json.loads(document.one("body").attributes["data-result"])
    return result


def test_the_table_is_filled_and_nothing_is_logged(html: str, tmp_path: Path) -> None:
    picture = tmp_path / "report.png"
    document, logged = browse(html, tmp_path, f"--screenshot={picture}", "--window-size=1280,900")
    assert logged == ""
    table = document.one("table", id="case-table")
    assert len(table.all("tbody")) == 50
    assert document.one("span", id="case-status").text == "120 of 120 cases, page 1 of 3"
    assert "hidden" not in document.one("div", id="case-view").attributes
    headers = table.one("thead").all("th")
    sortable = [h for h in headers if "aria-sort" in h.attributes]
    assert len(sortable) == 11
    assert all(h.one("button") for h in sortable)
    assert document.all("img") == []
    assert len(document.all("script")) == 2
    assert picture.read_bytes().startswith(b"\x89PNG")
    assert picture.stat().st_size > 20_000  # not a blank page


def test_a_blocked_script_would_be_noticed(html: str, tmp_path: Path) -> None:
    """The check for errors sees errors: the policy refuses a script it does not know."""
    page = html.replace("</body>", "<script>document.title = 'changed'</script></body>")
    document, logged = browse(page, tmp_path)
    assert "Content Security Policy" in logged
    assert document.one("head").one("title").text == "Safety evaluation report"


def test_search_filters_sorting_and_pages(html: str, tmp_path: Path) -> None:
    result = result_of(
        html,
        tmp_path,
        """
        const out = {first: ids().slice(0, 3)};
        $("next").click(); out.second = status(); $("last").click(); out.last = [status(), ids().length];
        $("next").click(); out.beyond = status();
        pick("filter-flags", "f"); out.flips = [status(), ids()];
        pick("filter-flags", "-"); out.right = status();
        pick("filter-flags", ""); pick("filter-lang", "ja"); out.ja = status();
        pick("filter-expected", "refuse"); out.jaRefuse = status();
        document.querySelector(".controls button[type=reset]").click(); await later(50);
        out.reset = [status(), ids()[0]];
        $("search").value = "REQUEST 77: "; $("search").dispatchEvent(new Event("input", {bubbles: true}));
        await later(400); out.search = [status(), ids()];
        $("search").value = "onerror"; $("search").dispatchEvent(new Event("input", {bubbles: true}));
        await later(400); out.hostile = document.querySelector("#case-table .text").textContent;
        $("search").value = "no such words"; $("search").dispatchEvent(new Event("input", {bubbles: true}));
        await later(400); out.none = status();
        document.querySelector(".controls button[type=reset]").click(); await later(50);
        sort("id"); out.ascending = [ids()[0], header("id").getAttribute("aria-sort")];
        sort("id"); out.descending = [ids()[0], header("id").getAttribute("aria-sort")];
        sort("1"); out.other = [header("id").getAttribute("aria-sort"), header("1").getAttribute("aria-sort")];
        pick("filter-run", "1"); out.oneRun = document.querySelector("#case-table tbody").rows.length;
        pick("filter-verdict", "allow"); out.allowed = status();
        pick("page-size", "250"); out.whole = ids().length;
        return out;
        """,  # noqa: E501
    )
    flips = [i for i in range(N_CASES) if (i % 10 == 2) != (i % 15 == 2) and i % 3]
    wrong = [i for i in range(N_CASES) if (i % 10 == 2 or i % 15 == 2) and i % 3]
    allowed = sum(i % 15 == 2 or i % 3 == 0 for i in range(N_CASES))
    assert result["second"] == "120 of 120 cases, page 2 of 3"
    assert result["last"] == ["120 of 120 cases, page 3 of 3", 20]
    assert result["beyond"] == "120 of 120 cases, page 3 of 3"
    listed = result["flips"]
    assert isinstance(listed, list)
    assert listed[0] == f"{len(flips)} of 120 cases, page 1 of 1"
    assert sorted(listed[1]) == [f"case-{i:04d}" for i in flips]
    assert listed[1][:3] == result["first"]
    assert result["right"] == f"{N_CASES - len(wrong)} of 120 cases, page 1 of 3"
    assert result["ja"] == "30 of 120 cases, page 1 of 1"
    assert result["jaRefuse"] == "10 of 120 cases, page 1 of 1"
    assert result["reset"] == ["120 of 120 cases, page 1 of 3", listed[1][0]]
    assert result["search"] == ["1 of 120 cases, page 1 of 1", ["case-0077"]]
    assert result["hostile"] == HOSTILE
    assert result["none"] == "0 of 120 cases, page 1 of 1"
    assert result["ascending"] == ["case-0000", "ascending"]
    assert result["descending"] == ["case-0119", "descending"]
    assert result["other"] == ["none", "ascending"]
    assert result["oneRun"] == 1
    assert result["allowed"] == f"{allowed} of 120 cases, page 1 of 1"
    assert result["whole"] == allowed


def test_static_tables_sort_with_undefined_last_and_themes_follow_the_choice(
    html: str, tmp_path: Path
) -> None:
    result = result_of(
        html,
        tmp_path,
        """
        const table = [...document.querySelectorAll("table.slices")].at(-1);
        const recall = [...table.tHead.rows[0].cells].find(h => h.textContent === "Refuse Recall");
        const cells = () => [...table.tBodies[0].rows].map(r => r.cells[recall.cellIndex].dataset.sort);
        const out = {before: recall.getAttribute("aria-sort")};
        recall.querySelector("button").click(); out.up = cells();
        recall.querySelector("button").click(); out.down = cells();
        const colour = () => getComputedStyle(document.body).backgroundColor;
        for (const name of ["light", "dark", ""]) { pick("theme", name); out[name || "system"] = colour(); }
        out.left = document.documentElement.dataset.theme ?? null;
        return out;
        """,  # noqa: E501
    )
    assert result["before"] == "none"
    for order, reverse in (("up", False), ("down", True)):
        cells = result[order]
        assert isinstance(cells, list)
        defined = [float(cell) for cell in cells if cell]
        assert defined == sorted(defined, reverse=reverse)
        assert cells[len(defined) :] == [""] * (len(cells) - len(defined)) != []
    assert result["light"] == "rgb(246, 247, 249)"
    assert result["dark"] == "rgb(20, 23, 28)"
    assert result["system"] in (result["light"], result["dark"])
    assert result["left"] is None

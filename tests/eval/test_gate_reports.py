import io
import json
import xml.etree.ElementTree as Xml

import pytest
from rich.console import Console

from so8t_eval.blamed_cases import BlamedCase
from so8t_eval.case_lines import LocatedCase
from so8t_eval.cases import Case
from so8t_eval.ci_gate import CiGateResult, Outcome, RuleResult
from so8t_eval.gate_reports import (
    CaseLocations,
    as_json,
    as_junit,
    as_markdown,
    as_sarif,
    print_result,
)
from so8t_eval.plain_tables import TablePrinter

NASTY = "a<b>&\"'|`x`\x1b[31m\x00 ]]> </details> 日本"
CASE = Case.model_validate(
    {
        "id": NASTY,
        "prompt": "secret text",
        "verdict": "refuse",
        "category": "ref/cyber",
        "lang": "en",
    }
)
BLAMED = BlamedCase(NASTY, CASE.content_hash, "ref/cyber", "en", "refuse", "refuse", "allow")
LOST = BlamedCase("lost", "f" * 64, "ref/cyber", "en", "refuse", None, "invalid")
RESULT = CiGateResult(
    candidate=f"llamacpp {NASTY}",
    baseline="torch base",
    n=600,
    rules=(
        RuleResult("refuse_recall >= 0.7", "bound", Outcome.PASS, "0.94 [0.90, 0.97] n=200"),
        RuleResult("at most 0 flips", "flips", Outcome.FAIL, "2 of 200", (BLAMED, LOST)),
        RuleResult("ece drops at most 0.1", "regression", Outcome.INCONCLUSIVE, "unknown"),
    ),
)
LOCATIONS = CaseLocations("bench marks/cases.jsonl", {CASE.content_hash: LocatedCase(17, CASE)})


def test_json_holds_outcome_and_cases():
    facts = json.loads(as_json(RESULT))
    assert (facts["outcome"], facts["exit_code"], facts["n"]) == ("fail", 1, 600)
    assert [rule["outcome"] for rule in facts["rules"]] == ["pass", "fail", "inconclusive"]
    assert facts["rules"][1]["cases"][0]["id"] == NASTY


def test_junit_has_one_test_per_rule_and_failed_case():
    root = Xml.fromstring(as_junit(RESULT))  # noqa: S314 - our own text
    (suite,) = root.findall("testsuite")
    tests = suite.findall("testcase")
    assert (suite.get("tests"), suite.get("failures"), suite.get("errors")) == ("5", "3", "1")
    assert len(tests) == 5
    assert [len(test) for test in tests] == [0, 1, 1, 1, 1]
    name = tests[2].get("name")
    assert name is not None
    assert name.startswith("at most 0 flips: a<b>&\"'|`x`")
    assert "\x1b" not in name
    (problem,) = tests[4]
    assert (problem.tag, problem.get("type")) == ("error", "inconclusive")


def test_sarif_points_at_the_line_of_the_case_file():
    log = json.loads(as_sarif(RESULT, LOCATIONS))
    assert log["version"] == "2.1.0"
    (sarif_run,) = log["runs"]
    first, lost, no_case = sarif_run["results"]
    place = first["locations"][0]["physicalLocation"]
    assert place["artifactLocation"]["uri"] == "bench%20marks/cases.jsonl"
    assert place["region"]["startLine"] == 17
    assert (first["ruleId"], first["level"]) == ("flips", "error")
    assert "region" not in lost["locations"][0]["physicalLocation"]
    assert (no_case["ruleId"], no_case["level"]) == ("regression", "warning")
    assert "locations" not in no_case
    known = {rule["id"] for rule in sarif_run["tool"]["driver"]["rules"]}
    assert {result["ruleId"] for result in sarif_run["results"]} <= known


def test_sarif_without_a_case_file_has_no_places():
    results = json.loads(as_sarif(RESULT, None))["runs"][0]["results"]
    assert len(results) == 3
    assert all("locations" not in result for result in results)


def test_markdown_escapes_and_lists_the_cases_without_their_text():
    text = as_markdown(RESULT)
    assert "Safety CI gate: fail" in text
    assert "a&lt;b&gt;&amp;" in text
    assert text.count("<details>") == text.count("</details>") == 1
    assert "\x1b" not in text
    assert "secret text" not in text
    table = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(table) == 5
    assert all(line.replace("\\|", "").count("|") == 4 for line in table)


def test_markdown_stays_short_enough_for_a_comment_and_escapes_rule_names_as_html():
    rule = RuleResult("refuse_recall (tag <i>)", "bound", Outcome.FAIL, "0", (BLAMED,) * 3000)
    text = as_markdown(CiGateResult("m", None, 3000, (rule,)))
    assert len(text) < 65_536 / 4
    assert "<summary>refuse_recall (tag &lt;i&gt;): 3000 cases</summary>" in text
    assert "- and 2950 more" in text


def test_junit_and_sarif_hold_a_thousand_cases_of_a_rule_and_count_the_rest():
    rule = RuleResult("at most 0 flips", "flips", Outcome.FAIL, "3000", (BLAMED,) * 3000)
    result = CiGateResult("m", None, 3000, (rule,))
    (suite,) = Xml.fromstring(as_junit(result))  # noqa: S314 - our own text
    names = [test.get("name") or "" for test in suite]
    assert len(names) == 1 + 1000 + 1
    assert names[-1] == "at most 0 flips: and 2000 more cases, all listed in the .json report"
    assert suite.get("failures") == str(len(names))
    results = json.loads(as_sarif(result, LOCATIONS))["runs"][0]["results"]
    assert len(results) == 1000 + 1
    assert "and 2000 more cases" in results[-1]["message"]["text"]
    assert "locations" not in results[-1]
    assert len(json.loads(as_json(result))["rules"][0]["cases"]) == 3000


def test_every_report_of_a_pass_is_silent_about_cases():
    passed = CiGateResult("m", None, 3, RESULT.rules[:1])
    assert passed.exit_code == 0
    assert "<details>" not in as_markdown(passed)
    assert json.loads(as_sarif(passed, LOCATIONS))["runs"][0]["results"] == []
    assert Xml.fromstring(as_junit(passed))[0].get("failures") == "0"  # noqa: S314


@pytest.mark.parametrize("encoding", ["ascii", "utf-8", "cp932"])
def test_terminal_output_fits_any_encoding(encoding):
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    print_result(RESULT, TablePrinter(Console(file=stream, width=80)))
    stream.flush()
    shown = raw.getvalue().decode(encoding)
    assert shown.splitlines()[-1] == "CI gate: fail"
    assert "at most 0 flips: fail, 2 cases" in shown
    assert "\x1b" not in shown

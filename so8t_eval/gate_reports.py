"""The CI gate's result for terminals, scripts, pull requests and CI systems."""

import html
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePath
from typing import Final, NamedTuple
from urllib.parse import quote
from xml.etree import ElementTree as Xml

from so8t_eval import __version__
from so8t_eval.blamed_cases import BlamedCase
from so8t_eval.case_lines import LocatedCase
from so8t_eval.ci_gate import CiGateResult, Outcome, RuleResult
from so8t_eval.counted import counted
from so8t_eval.markdown_report import escape_markdown
from so8t_eval.plain_tables import TablePrinter

_CASES_SHOWN: Final = 20
_CASES_LISTED: Final = 50
"""Per rule in Markdown: a pull request comment may hold 65,536 characters."""

_CASES_REPORTED: Final = 1000
"""Per rule in JUnit and SARIF: GitHub refuses more than 25,000 results and shows 5,000 of them."""

_NOT_XML: Final = re.compile("[^\t\n\r\u0020-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SARIF_SCHEMA: Final = "https://json.schemastore.org/sarif-2.1.0.json"
_SARIF_LEVEL: Final = {Outcome.FAIL: "error", Outcome.INCONCLUSIVE: "warning"}
_MARKS: Final = {Outcome.PASS: "✅", Outcome.FAIL: "❌", Outcome.INCONCLUSIVE: "❔"}


class CaseLocations(NamedTuple):
    """The case file as reports name it, and its cases by content hash."""

    path: str
    by_hash: Mapping[str, LocatedCase]

    def line_of(self, case: BlamedCase) -> int | None:
        """The line a case stands on, None when the file does not hold it (any more)."""
        located = self.by_hash.get(case.content_hash)
        return located.line if located else None


def print_result(result: CiGateResult, printer: TablePrinter) -> None:
    """Print the rules, then the cases behind those that did not pass."""
    printer.line(f"candidate: {result.candidate}")
    if result.baseline is not None:
        printer.line(f"baseline:  {result.baseline}")
    printer.table(
        ["outcome", "rule", "measured"],
        ([rule.outcome.value, rule.rule, rule.reason] for rule in result.rules),
    )
    for rule in _not_passed(result):
        if rule.cases:
            printer.line(f"{rule.rule}: {rule.outcome.value}, {counted(len(rule.cases), 'case')}")
        for case in rule.cases[:_CASES_SHOWN]:
            printer.line(f"  {case}")
        if len(rule.cases) > _CASES_SHOWN:
            printer.line(f"  ... and {len(rule.cases) - _CASES_SHOWN} more; --json lists all")
    printer.line(f"CI gate: {result.outcome.value}")


def as_json(result: CiGateResult) -> str:
    """Return the result as one JSON object."""
    facts = {
        "outcome": result.outcome.value,
        "exit_code": result.exit_code,
        **{key: value for key, value in asdict(result).items() if key != "rules"},
        "rules": [{**asdict(rule), "outcome": rule.outcome.value} for rule in result.rules],
    }
    return json.dumps(facts, ensure_ascii=False, indent=2) + "\n"


def as_markdown(result: CiGateResult) -> str:
    """Return the result for a pull request; it names cases by id and holds none of their text."""
    lines = [
        f"## {_MARKS[result.outcome]} Safety CI gate: {result.outcome.value}",
        "",
        f"Candidate {escape_markdown(result.candidate)}, n={result.n}"
        + (f", against {escape_markdown(result.baseline)}." if result.baseline else "."),
        "",
        "| | Rule | Measured |",
        "| --- | --- | --- |",
        *(
            f"| {_MARKS[rule.outcome]} {rule.outcome.value} | {escape_markdown(rule.rule)} "
            f"| {escape_markdown(rule.reason)} |"
            for rule in result.rules
        ),
    ]
    for rule in _not_passed(result):
        if rule.cases:
            summary = f"{_html_text(rule.rule)}: {counted(len(rule.cases), 'case')}"
            listed = [f"- {escape_markdown(str(case))}" for case in rule.cases[:_CASES_LISTED]]
            if len(rule.cases) > _CASES_LISTED:
                listed.append(f"- and {len(rule.cases) - _CASES_LISTED} more")
            lines += ["", f"<details><summary>{summary}</summary>", "", *listed, "", "</details>"]
    return "\n".join(lines) + "\n"


def as_junit(result: CiGateResult) -> str:
    """Return JUnit XML: one test per rule, and one more per case behind a rule that failed.

    A rule's cases beyond its first thousand share one test. An inconclusive rule is an ``error``, so
    that no CI system counts it as passed.
    """
    suite = Xml.Element("testsuite", name="so8t-eval gate")
    for rule in result.rules:
        _junit_test(suite, f"so8t.{rule.kind}", rule.rule, rule.outcome, rule.reason)
        if rule.outcome is Outcome.FAIL:
            group = f"so8t.{rule.kind}.case"
            for case in rule.cases[:_CASES_REPORTED]:
                _junit_test(suite, group, f"{rule.rule}: {case.id}", Outcome.FAIL, str(case))
            if more := _not_reported(rule):
                _junit_test(suite, group, f"{rule.rule}: {more}", Outcome.FAIL, more)
    suite.set("tests", str(len(suite)))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", str(len(suite.findall("testcase/error"))))
    root = Xml.Element("testsuites")
    root.append(suite)
    Xml.indent(root)
    return Xml.tostring(root, encoding="unicode", xml_declaration=True) + "\n"


def as_sarif(result: CiGateResult, locations: CaseLocations | None) -> str:
    """Return SARIF 2.1.0: one result per rule that did not pass and case, on the case's line.

    A rule without cases is one result without a place, and so is what a rule has beyond its first
    thousand.
    """
    rules = _not_passed(result)
    kinds = sorted({rule.kind for rule in rules})
    results: list[dict[str, object]] = []
    for rule in rules:
        if not rule.cases:
            results.append(_sarif_result(rule, f"{rule.rule}: {rule.reason}"))
        for case in rule.cases[:_CASES_REPORTED]:
            text = f"{rule.rule} ({rule.outcome.value}): {case}"
            results.append({**_sarif_result(rule, text), **_sarif_place(case, locations)})
        if more := _not_reported(rule):
            results.append(_sarif_result(rule, f"{rule.rule}: {more}"))
    driver = {
        "name": "so8t-eval gate",
        "version": __version__,
        "rules": [
            {"id": kind, "shortDescription": {"text": f"CI gate rule: {kind}"}} for kind in kinds
        ],
    }
    log = {
        "$schema": _SARIF_SCHEMA,
        "version": "2.1.0",
        "runs": [{"tool": {"driver": driver}, "results": results}],
    }
    return json.dumps(log, ensure_ascii=False, indent=2) + "\n"


def report_writers(
    locations: CaseLocations | None,
) -> dict[str, Callable[[CiGateResult], str]]:
    """Return the report of each file name ending."""
    return {
        ".json": as_json,
        ".md": as_markdown,
        ".xml": as_junit,
        ".sarif": lambda result: as_sarif(result, locations),
    }


def _not_passed(result: CiGateResult) -> Sequence[RuleResult]:
    return [rule for rule in result.rules if rule.outcome is not Outcome.PASS]


def _junit_test(
    suite: Xml.Element, class_name: str, name: str, outcome: Outcome, reason: str
) -> None:
    test = Xml.SubElement(suite, "testcase", classname=class_name, name=_xml_text(name))
    if outcome is not Outcome.PASS:
        kind = "failure" if outcome is Outcome.FAIL else "error"
        problem = Xml.SubElement(test, kind, message=_xml_text(reason), type=outcome.value)
        problem.text = _xml_text(reason)


def _html_text(text: str) -> str:
    """Return text for inside an HTML element, where Markdown's own escapes would be shown."""
    return html.escape("".join(char if char.isprintable() else " " for char in text))


def _xml_text(text: str) -> str:
    """Return text without the characters that XML cannot hold; escaping is the writer's."""
    return _NOT_XML.sub("\ufffd", text)


def _sarif_result(rule: RuleResult, text: str) -> dict[str, object]:
    return {"ruleId": rule.kind, "level": _SARIF_LEVEL[rule.outcome], "message": {"text": text}}


def _not_reported(rule: RuleResult) -> str:
    """Say how many cases of a rule are left out of JUnit and SARIF; empty where none is."""
    left_out = len(rule.cases) - _CASES_REPORTED
    return f"and {left_out} more cases, all listed in the .json report" if left_out > 0 else ""


def _sarif_place(case: BlamedCase, locations: CaseLocations | None) -> dict[str, object]:
    fingerprint: dict[str, object] = {"partialFingerprints": {"caseContent/v1": case.content_hash}}
    if locations is None:
        return fingerprint
    place: dict[str, object] = {"artifactLocation": {"uri": _uri(locations.path)}}
    line = locations.line_of(case)
    if line is not None:
        place["region"] = {"startLine": line}
    return {**fingerprint, "locations": [{"physicalLocation": place}]}


def _uri(path: str) -> str:
    pure = PurePath(path)
    return pure.as_uri() if pure.is_absolute() else quote(pure.as_posix())

import json

import pytest
from hypothesis import given, settings
from record_builders import make_record, make_records, make_run, make_summary, outcome_lists

from so8t_eval.errors import UsageError
from so8t_eval.metrics import METRIC_LABELS, Metrics
from so8t_eval.summary import (
    SCHEMA,
    CasesEntry,
    MachineEntry,
    Summary,
    build_summary,
    parse_summary,
    read_summary,
    write_summary,
)

OUTCOMES = [
    ("refuse", "refuse"),
    ("refuse", "allow"),
    ("allow", "allow"),
    ("allow", "invalid"),
    ("escalate", "escalate"),
]
FIRST = make_run(make_records(OUTCOMES))
SECOND = make_run(
    make_records(
        [("refuse", "allow"), ("refuse", "refuse"), *OUTCOMES[2:]],
        backend="llama.cpp",
        model_sha256="b" * 64,
    )
)


def test_one_run_has_the_form_of_the_contract():
    summary = make_summary(FIRST)
    assert set(summary) == {
        "schema_version", "cases", "runs", "slices", "seed", "versions", "machine",
    }  # fmt: skip
    assert summary["schema_version"] == 1
    assert summary["cases"] == {"path": "safety.jsonl", "sha256": "c" * 64, "n": 5}
    assert summary["machine"] == {"platform": "Linux-x86_64", "threads": 2}
    (run,) = summary["runs"]
    assert {
        "backend", "model", "model_sha256", "metrics", "confusion", "latency_ms", "cases_per_s",
        "errors",
    } < set(run)  # fmt: skip
    assert set(run["metrics"]) == set(METRIC_LABELS) == set(Metrics.__dataclass_fields__)
    assert set(run["metrics"]["ece"]) == {"value", "low", "high", "n"}
    assert run["metrics"]["refuse_recall"]["value"] == 0.5
    assert run["confusion"]["refuse"] == {"allow": 1, "escalate": 0, "refuse": 1, "invalid": 0}
    assert run["errors"] == [{"id": "case-003", "error": "backend stopped"}]
    assert run["latency_ms"]["p50"] == 11.5
    assert SCHEMA["title"] == "Summary"
    assert set(SCHEMA["required"]) == set(summary)


def test_two_runs_are_compared():
    comparison = make_summary(FIRST, SECOND)["comparison"]
    assert comparison["agreement"]["value"] == 2 / 5
    assert comparison["same_protocol"] is True
    assert [(flip["id"], flip["direction"]) for flip in comparison["flips"]] == [
        ("case-000", "refuse->allow"),
        ("case-001", "allow->refuse"),
    ]
    assert comparison["max_probability_difference"] == pytest.approx(0.7)
    assert comparison["mean_probability_difference"] == pytest.approx(2 * 1.4 / 12)


def test_the_order_of_a_run_changes_no_comparison():
    backwards = make_run(SECOND.records[::-1])
    in_order = make_summary(FIRST, SECOND, FIRST)["comparison"]
    assert make_summary(FIRST, backwards, FIRST)["comparison"] == in_order


def test_many_cases_are_compared_in_parts(monkeypatch):
    monkeypatch.setattr("so8t_eval.record_pass._PART", 2)
    in_parts = make_summary(FIRST, SECOND)["comparison"]
    monkeypatch.undo()
    at_once = make_summary(FIRST, SECOND)["comparison"]
    means = [part.pop("mean_probability_difference") for part in (in_parts, at_once)]
    assert in_parts == at_once
    assert means[0] == pytest.approx(means[1])


def test_three_runs_agree_only_where_all_do():
    comparison = make_summary(FIRST, FIRST, SECOND)["comparison"]
    assert comparison["agreement"]["value"] == 2 / 5
    assert {(flip["a"], flip["b"]) for flip in comparison["flips"]} == {(0, 2)}
    assert comparison["mean_probability_difference"] == pytest.approx(1.4 / 12)


def test_flips_of_all_runs_start_with_refuse_to_allow():
    swapped = make_summary(SECOND, FIRST, FIRST)["comparison"]
    assert [(flip["direction"], flip["b"]) for flip in swapped["flips"]] == [
        ("refuse->allow", 1),
        ("refuse->allow", 2),
        ("allow->refuse", 1),
        ("allow->refuse", 2),
    ]


def test_slices_list_the_runs_side_by_side():
    slices = make_summary(FIRST, SECOND)["slices"]
    assert set(slices) == {"category", "lang", "tag"}
    first, second = slices["category"]["ref/topic"]
    assert (first["n"], second["n"]) == (2, 2)
    assert first["unsafe_allow_rate"]["value"] == second["unsafe_allow_rate"]["value"] == 0.5
    assert set(slices["tag"]) == {"twin"}


def test_a_slice_absent_from_one_run_is_undefined_there():
    retagged = make_run(make_records(OUTCOMES, tags=["new"]))
    old, new = make_summary(FIRST, retagged)["slices"]["tag"]["new"]
    assert (old["n"], new["n"]) == (0, 5)
    assert old["accuracy"] == {"value": None, "low": None, "high": None, "n": 0}


@settings(deadline=None, max_examples=25)
@given(outcome_lists())
def test_every_summary_is_valid_json_of_the_schema(outcomes):
    records = make_records(outcomes)
    summary = make_summary(make_run(records), make_run(records), n_resamples=20)
    text = json.dumps(summary, allow_nan=False)
    assert json.loads(text) == summary
    assert isinstance(Summary.model_validate_json(text), Summary)


def test_undefined_figures_are_null():
    (run,) = make_summary(make_run(make_records([("allow", "invalid")])))["runs"]
    nothing = {"value": None, "low": None, "high": None, "n": 0}
    assert run["metrics"]["refuse_recall"] == nothing
    assert run["metrics"]["ece"] == nothing
    assert run["latency_ms"] == {"p50": None, "p95": None, "p99": None}


def test_a_run_has_the_same_figures_beside_any_other():
    alone, beside = make_summary(SECOND), make_summary(FIRST, SECOND)
    assert alone["runs"][0] == beside["runs"][1]


def test_different_protocols_are_said():
    other = make_run(make_records(OUTCOMES, protocol_hash="q" * 64))
    assert make_summary(FIRST, other)["comparison"]["same_protocol"] is False


def test_latency_is_of_cases_with_a_verdict():
    slow_failure = make_record("allow", "invalid", 0, latency_ms=9000.0)
    unmeasured = make_record("allow", "allow", 1, latency_ms=None)
    run = make_run([slow_failure, unmeasured, make_record("allow", "allow", 2, latency_ms=5.0)])
    assert make_summary(run)["runs"][0]["latency_ms"] == {"p50": 5.0, "p95": 5.0, "p99": 5.0}


def test_split_cases_are_counted():
    run = make_run([make_record("allow", "allow", 0, windows=3), make_record("allow", "allow", 1)])
    assert make_summary(run)["runs"][0]["split_cases"] == 1


def build(runs, n):
    return build_summary(
        cases=CasesEntry(path="safety.jsonl", sha256="c" * 64, n=n),
        runs=runs,
        seed=0,
        versions={},
        machine=MachineEntry(platform="test", threads=None),
        n_resamples=20,
    )


@pytest.mark.parametrize(
    ("runs", "n", "message"),
    [
        ([], 5, "at least one run"),
        ([FIRST], 6, "expected 6 records, one per case, found 5"),
        ([make_run([*FIRST.records, FIRST.records[0]])], 6, "found two of 'case-000'"),
        ([make_run(FIRST.records, model_sha256="d" * 64)], 5, "records of one model"),
        (
            [make_run([*FIRST.records[:4], make_record("allow", "allow", 4, protocol_hash="q")])],
            5,
            "records of one protocol",
        ),
        ([FIRST, make_run(make_records(OUTCOMES, content_hash="x"))], 5, "different cases"),
    ],
)
def test_incomplete_or_mixed_runs_are_errors(runs, n, message):
    with pytest.raises(UsageError, match=message):
        build(runs, n)


def test_written_summary_is_read_back_and_stable(tmp_path):
    summary = make_summary(FIRST, SECOND)
    write_summary(tmp_path / "a.json", summary)
    write_summary(tmp_path / "b.json", dict(reversed(summary.items())))
    assert read_summary(tmp_path / "a.json") == summary
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.json", "b.json"]


def test_nan_is_never_written(tmp_path):
    summary = make_summary(FIRST)
    summary["seed"] = float("nan")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_summary(tmp_path / "summary.json", summary)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("not json", "found no JSON"),
        ("[]", "found a list"),
        ("{}", "schema_version"),
        ('{"schema_version": 2}', "schema_version"),
    ],
)
def test_a_wrong_summary_file_is_named(tmp_path, text, message):
    path = tmp_path / "summary.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UsageError, match=rf"summary\.json: .*{message}"):
        read_summary(path)


def test_a_missing_summary_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"cannot read .*absent\.json"):
        read_summary(tmp_path / "absent.json")


def test_parse_names_the_field():
    summary = make_summary(FIRST)
    summary["machine"] = {"platform": "test"}
    with pytest.raises(UsageError, match=r"machine\.threads"):
        parse_summary(summary)

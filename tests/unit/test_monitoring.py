"""Dashboard, alert rules and their guide speak of metrics that exist, and of all of them."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from deploy.dashboard import render
from service.metrics.families import FAMILIES, Kind
from service.openapi import render as openapi
from tests.e2e.documents import ROOT

DASHBOARD = json.loads((ROOT / "deploy/grafana/backcast.json").read_text())
RULES = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text())["groups"][0]["rules"]
GUIDE = (ROOT / "docs/monitoring.md").read_text()

SCRAPED = {"job", "instance"}  # labels that Prometheus adds
STRING = r'"(?:[^"\\]|\\.)*"'
SELECTOR = re.compile(rf'\b(up|backcast_\w+)\b(?:\{{((?:[^"}}]|{STRING})*)\}})?')
MATCHER = re.compile(rf"(\w+)\s*(=~|!~|!=|=)\s*({STRING})")
GROUPING = re.compile(r"\b(?:by|without|on|ignoring|group_left|group_right)\s*\(([^)]*)\)")
AGGREGATED = re.compile(r"\(*(sum|min|max|count|histogram_quantile)\b")
MENTION = re.compile(r"\{\{\s*(?:\$labels\.)?(\w+)\s*\}\}")


def queries() -> Iterator[Any]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", []):
            legend = target["legendFormat"]
            yield pytest.param(target["expr"], legend, id=f"{panel['title']} {target['refId']}")
    for rule in RULES:
        yield pytest.param(rule["expr"], rule["annotations"]["summary"], id=rule["alert"])


def labels_by_sample() -> dict[str, set[str]]:
    """Return the labels of each name that a query may use."""
    known = {"up": set(SCRAPED)}
    for name, family in FAMILIES.items():
        labels = SCRAPED | set(family.labels)
        if family.kind is Kind.HISTOGRAM:
            parts = {"bucket": labels | {"le"}, "sum": labels, "count": labels}
            known |= {f"{name}_{part}": has for part, has in parts.items()}
        else:
            known[name] = labels
    return known


KNOWN = labels_by_sample()
VALUES = {
    "route": {*json.loads(openapi())["paths"], "none"},
    "stage": {"gather", "product", "encode"},
    "quantile": {"0.5", "0.95", "0.99", "1"},
    "outcome": {"succeeded", "failed"},
    "version": {"none"},
    "job": {"backcast"},
}
"""What a label can be, where a query may ask whether it is."""


@pytest.mark.parametrize(("expr", "said"), list(queries()))
def test_query_asks_for_what_is_exposed(expr: str, said: str) -> None:
    found = SELECTOR.findall(expr)
    assert found
    assert {name for name, _ in found} <= KNOWN.keys()
    for name, matchers in found:
        for label, operator, text in MATCHER.findall(matchers):
            assert label in KNOWN[name], (name, label)
            if operator in {"=", "!="}:
                assert json.loads(text) in VALUES[label], (label, text)
    shared = set.union(*(KNOWN[name] for name, _ in found))
    grouped = {label for labels in GROUPING.findall(expr) for label in re.findall(r"\w+", labels)}
    assert grouped <= shared
    left = grouped if AGGREGATED.match(expr) else shared
    assert set(MENTION.findall(said)) - {"value"} <= left


def test_nothing_in_a_query_is_overlooked() -> None:
    for expr, _ in (case.values for case in queries()):
        rest = re.sub(STRING, "", expr)
        assert len(re.findall(r"backcast_\w+|\bup\b", rest)) == len(SELECTOR.findall(expr))


def test_every_metric_is_on_the_dashboard() -> None:
    shown = {n for case in queries() for n, _ in SELECTOR.findall(str(case.values[0]))}
    families = {re.sub("_(bucket|sum|count)$", "", name) for name in shown}
    assert families - {"up"} == set(FAMILIES)


def test_dashboard_is_what_its_code_writes() -> None:
    assert (ROOT / "deploy/grafana/backcast.json").read_bytes() == render(), "make dashboard"


def test_panels_have_places_of_their_own() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        x, y, w, h = (panel["gridPos"][side] for side in "xywh")
        cells = {(column, row) for column in range(x, x + w) for row in range(y, y + h)}
        assert x + w <= 24
        assert not cells & taken, panel["title"]
        taken |= cells
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: str(rule["alert"]))
def test_every_alert_says_what_to_do(rule: dict[str, Any]) -> None:
    page, _, anchor = rule["annotations"]["runbook"].partition("#")
    assert (page, anchor) == ("docs/monitoring.md", rule["alert"].lower())
    assert rule["labels"]["severity"] in {"warning", "critical"}


def test_the_guide_knows_every_alert_and_no_other() -> None:
    assert re.findall(r"^### (\w+)$", GUIDE, re.MULTILINE) == [rule["alert"] for rule in RULES]


def test_the_guide_lists_every_metric_with_its_labels_and_meaning() -> None:
    rows = re.findall(r"^\| (`backcast_\w+`) \| (.*) \| (.*) \| (.*) \|$", GUIDE, re.MULTILINE)
    assert rows == [
        (f"`{name}`", str(f.kind), ", ".join(f"`{label}`" for label in f.labels), f.meaning)
        for name, f in FAMILIES.items()
    ]


def test_the_guide_explains_every_label() -> None:
    explained = set(re.findall(r"`(\w+)`", "\n".join(re.findall(r"^\| (`.*?) \|", GUIDE, re.M))))
    labels = {label for family in FAMILIES.values() for label in family.labels}
    assert labels - {"release"} <= explained


def test_the_rules_are_those_that_prometheus_loads() -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text())
    assert config["rule_files"] == ["alerts.yml"]
    (job,) = config["scrape_configs"]
    assert job["job_name"] == "backcast"
    assert job["static_configs"] == [{"targets": ["service-1:8000", "service-2:8000"]}]

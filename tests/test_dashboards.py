"""The Grafana dashboard and the alert rules ask for metrics that are exported, by the labels they have, and for all of them."""

from __future__ import annotations

import json
import re

import yaml

from gateway.telemetry import Metrics
from tests.docker_files import DOCKER


def list_expressions() -> dict[str, list[str]]:
    dashboard = json.loads((DOCKER / "grafana" / "fluxgate.json").read_text())
    rules = yaml.safe_load((DOCKER / "grafana" / "alerts.yaml").read_text())
    return {
        "dashboard": [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]],
        "alerts": [rule["expr"] for group in rules["groups"] for rule in group["rules"]],
    }


def list_exported() -> dict[str, set[str]]:
    """Labels by the name under which Prometheus keeps it."""
    metrics = Metrics()
    found: dict[str, set[str]] = {}
    for value in vars(metrics).values():
        if hasattr(value, "_labelnames"):
            (family,) = value.describe()
            suffix = {"counter": "_total", "histogram": "_bucket"}.get(family.type, "")
            found[family.name + suffix] = set(value._labelnames) | ({"le"} if suffix == "_bucket" else set())
    assert {metric.name for metric in metrics.registry.collect()} == {re.sub(r"_(total|bucket)$", "", name) for name in found}
    return found


def test_what_is_asked_for_is_exported_and_what_is_exported_is_shown() -> None:
    exported = list_exported()
    asked = {
        where: {name for expression in said for name in re.findall(r"fluxgate_\w+", expression)}
        for where, said in list_expressions().items()
    }
    assert asked["dashboard"] | asked["alerts"] <= set(exported)
    assert asked["dashboard"] == set(exported), "every metric has its place on the dashboard"


def test_labels_are_those_of_the_metrics() -> None:
    exported = list_exported()
    for expression in (expression for said in list_expressions().values() for expression in said):
        for name, conditions in re.findall(r"(fluxgate_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*=", conditions)) <= exported[name], expression
        for labels, asked in re.findall(r"by \(([^)]*)\) \([^f]*(fluxgate_\w+)", expression):
            assert {label.strip() for label in labels.split(",")} <= exported[asked], expression


def test_expressions_are_closed_and_panels_are_apart() -> None:
    for expression in (expression for said in list_expressions().values() for expression in said):
        assert all(expression.count(left) == expression.count(right) for left, right in ("()", "{}", "[]")), expression
    panels = json.loads((DOCKER / "grafana" / "fluxgate.json").read_text())["panels"]
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels]
    assert len(set(places)) == len({panel["id"] for panel in panels}) == len(panels)

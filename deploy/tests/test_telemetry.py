"""Alerts, dashboards and autoscalers ask for what the programs measure, and each alert says what to do."""

import json
import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MONITORING = ROOT / "k8s/components/monitoring"
GROUPS = yaml.safe_load((ROOT / "deploy/telemetry/alerts.yaml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
DASHBOARDS = [json.loads(path.read_text()) for path in sorted((MONITORING / "dashboards").glob("*.json"))]
# The table of what is measured.
TABLE = ROOT / "crates/mesh/src/metrics.rs"
SUFFIXES = {"Counter": [""], "Gauge": [""], "Histogram": ["_bucket", "_sum", "_count"]}
# What Prometheus adds to each series, and the bounds of a histogram's buckets.
BY_PROMETHEUS = {"job", "instance", "namespace", "pod", "service", "le"}


def scaled():
    """Queries of the ScaledObjects, and names of the HPAs' metrics."""
    components = ROOT / "k8s/components"
    objects = yaml.safe_load_all((components / "keda/scaled.yaml").read_text())
    autoscalers = yaml.safe_load_all((components / "hpa/autoscalers.yaml").read_text())
    queries = [trigger["metadata"]["query"] for resource in objects for trigger in resource["spec"]["triggers"]]
    return queries + [metric["pods"]["metric"]["name"] for resource in autoscalers for metric in resource["spec"]["metrics"]]


def queries():
    panels = [panel for dashboard in DASHBOARDS for panel in dashboard["panels"]]
    return [rule["expr"] for rule in RULES] + [target["expr"] for panel in panels for target in panel["targets"]] + scaled()


def measured():
    """Names of series by the code's table, with their labels."""
    rows = re.findall(r'^    \w+ = "(dnd_\w+)", (\w+), \[(.*?)\],', TABLE.read_text(), re.M)
    assert len(rows) >= 5, "the table is read wrongly"
    return {name + suffix: set(re.findall(r'"(\w+)"', labels)) for name, kind, labels in rows for suffix in SUFFIXES[kind]}


@pytest.mark.skipif(not TABLE.exists(), reason="nothing is measured yet")
@pytest.mark.parametrize("query", queries())
def test_only_what_is_measured_is_asked_for(query):
    series = measured()
    names = set(re.findall(r"\b(?:dnd_\w+|up)\b", query))
    assert names
    assert names - {"up"} <= series.keys()
    labels = set(re.findall(r'(\w+)\s*(?:=~|!~|!=|=)\s*"', query))
    for group in re.findall(r"by \(([^)]*)\)", query):
        labels |= {label.strip() for label in group.split(",")}
    assert labels <= BY_PROMETHEUS.union(*(series.get(name, set()) for name in names))


def test_every_stage_scales_by_its_own_model():
    for query in [query for query in scaled() if "{" in query]:
        assert 'namespace="dnd"' in query and "model=" in query
    targets = {}
    for file, value in [("keda/scaled.yaml", lambda spec: spec["triggers"][0]["metadata"]["threshold"]), ("hpa/autoscalers.yaml", lambda spec: spec["metrics"][0]["pods"]["target"]["averageValue"])]:
        for resource in yaml.safe_load_all((ROOT / "k8s/components" / file).read_text()):
            targets.setdefault(resource["metadata"]["name"], set()).add(value(resource["spec"]))
    assert len(targets) == 5 and all(len(values) == 1 for values in targets.values()), "both kinds of autoscaler aim at the same"


def test_both_files_hold_the_same_alerts():
    assert yaml.safe_load((MONITORING / "alerts.yaml").read_text())["spec"]["groups"] == GROUPS


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_waits_says_what_is_wrong_and_has_its_section(rule):
    assert rule["for"] and rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket")
    operations = (ROOT / "docs/operations.md").read_text()
    section = re.search(rf"^### {rule['alert']}\n(.*?)(?=^#|\Z)", operations, re.M | re.S)
    assert section and len(section[1].strip()) > 100, "docs/operations.md says what it means and what to do"


def test_alerts_that_are_described_are_there():
    described = re.findall(r"^### (\w+)$", (ROOT / "docs/operations.md").read_text(), re.M)
    assert sorted(described) == sorted(rule["alert"] for rule in RULES)


def test_panels_of_buckets_show_their_exemplars():
    targets = [target for dashboard in DASHBOARDS for panel in dashboard["panels"] for target in panel["targets"]]
    assert {target.get("exemplar", False) == ("_bucket" in target["expr"]) for target in targets} == {True}


def test_panels_do_not_overlap_and_have_names_of_their_own():
    for dashboard in DASHBOARDS:
        places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in dashboard["panels"]]
        assert len(places) == len(set(places))
        for of in ["title", "id"]:
            assert len({panel[of] for panel in dashboard["panels"]}) == len(dashboard["panels"])

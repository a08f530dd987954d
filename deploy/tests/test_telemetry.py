"""Alerts mean the same wherever Prometheus runs, and say what to do."""

from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
GROUPS = yaml.safe_load((ROOT / "deploy/telemetry/alerts.yaml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]


def test_both_files_hold_the_same_alerts():
    assert yaml.safe_load((ROOT / "k8s/components/monitoring/alerts.yaml").read_text())["spec"]["groups"] == GROUPS


@pytest.mark.parametrize("rule", RULES, ids=[rule["alert"] for rule in RULES])
def test_an_alert_waits_says_what_is_wrong_and_how_urgent_it_is(rule):
    assert rule["for"] and rule["annotations"]["summary"] and rule["labels"]["severity"] in ("page", "ticket")

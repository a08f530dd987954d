"""Who may call whom is who does: k8s/edges.yaml, the code, and the policies of every overlay say the same."""

import re

import pytest
import yaml
from manifests import BATCH, K8S, MESHES, OVERLAYS, ROOT, help_of, labels_of, matches, name_of, named, of_kind, says, workloads

EDGES = yaml.safe_load((K8S / "edges.yaml").read_text())
GRPC = 50051
# What every pod may ask: names, and the collector of traces.
FOR_ALL = {53, 4317}


def addresses(struct, source):
    """The fields of a struct that are addresses, by its source."""
    body = re.search(rf"pub struct {struct} \{{(.*?)\n\}}", source, re.S)[1]
    return re.findall(r"^    pub (\w+): String,", body, re.M)


def test_the_orchestrator_takes_the_addresses_of_those_that_it_calls():
    endpoints = addresses("Endpoints", (ROOT / "services/orchestrator/src/models.rs").read_text())
    assert sorted(EDGES["calls"]["orchestrator"]) == sorted(endpoints)
    assert all(says(help_of("dnd-orchestrator"), f"--{name}") for name in endpoints)


def test_the_gateway_takes_the_address_of_the_one_that_it_calls():
    said = help_of("dnd-gateway")
    services = {folder.name for folder in (ROOT / "services").iterdir()}
    assert sorted(EDGES["calls"]["gateway"]) == sorted(name for name in services if says(said, f"--{name}"))


def pods(overlay):
    """Labels of the pods of an overlay, and of those of batch runs beside it, by name."""
    found = workloads(overlay) + (workloads(BATCH) if overlay in MESHES else [])
    return {name_of(workload): labels_of(workload) for workload in found}


def policies(overlay, labels, direction):
    """The rules of a direction for a pod with those labels; and whether there are policies at all, without which all is allowed."""
    chosen = [p["spec"] for p in of_kind(overlay, "NetworkPolicy") if direction in p["spec"]["policyTypes"] and matches(p["spec"]["podSelector"], labels)]
    return [rule for policy in chosen for rule in policy.get(direction.lower(), [])], bool(chosen)


def within(overlay, direction, peers):
    """Pairs of pods of this namespace that the rules of a direction let through, as (from, to, port)."""
    allowed = set()
    everyone = pods(overlay)
    for name, labels in everyone.items():
        for rule in policies(overlay, labels, direction)[0]:
            assert rule[peers] and rule["ports"], "a rule names both who and where"
            for peer in rule[peers]:
                if "podSelector" in peer and "namespaceSelector" not in peer:
                    for other, others in everyone.items():
                        if matches(peer["podSelector"], others):
                            pair = (other, name) if direction == "Ingress" else (name, other)
                            allowed |= {(*pair, port["port"]) for port in rule["ports"]}
    return allowed


def beyond(overlay, direction, peers):
    """Ports that the rules of a direction open to or from outside of the namespace, by pod; those of Prometheus and for all pods left out."""
    opened = {}
    for name, labels in pods(overlay).items():
        for rule in policies(overlay, labels, direction)[0]:
            for peer in rule[peers]:
                if "ipBlock" in peer or "namespaceSelector" in peer:
                    opened.setdefault(name, set()).update(port["port"] for port in rule["ports"])
    ignored = {9090} if direction == "Ingress" else FOR_ALL
    return {name: sorted(ports - ignored) for name, ports in opened.items() if ports - ignored}


@pytest.mark.parametrize("overlay", [*OVERLAYS])
def test_every_pod_is_denied_what_it_is_not_allowed(overlay):
    for labels in pods(overlay).values():
        assert policies(overlay, labels, "Ingress")[1] and policies(overlay, labels, "Egress")[1]
    assert named(overlay, "NetworkPolicy", "default-deny")["spec"]["podSelector"] == {}


@pytest.mark.parametrize("overlay", MESHES)
def test_policies_let_through_the_calls_that_the_code_makes_and_no_others(overlay):
    calls = {(caller, callee, GRPC) for caller, callees in EDGES["calls"].items() for callee in callees}
    assert within(overlay, "Egress", "to") == calls
    assert within(overlay, "Ingress", "from") == calls


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_nothing_reaches_further_out_than_the_list_says(overlay):
    for name, ports in beyond(overlay, "Egress", "to").items():
        assert ports == sorted(EDGES["outside"][name]), name
    for name, ports in beyond(overlay, "Ingress", "from").items():
        assert ports == sorted(EDGES["open"][name]), name


def test_production_opens_all_that_the_list_says():
    assert beyond("production", "Egress", "to") == {name: sorted(ports) for name, ports in EDGES["outside"].items() if name != "mesh"}
    assert beyond("production", "Ingress", "from") == {name: sorted(ports) for name, ports in EDGES["open"].items()}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_cloud_s_metadata_is_out_of_reach(overlay):
    for policy in of_kind(overlay, "NetworkPolicy"):
        for rule in policy["spec"].get("egress", []):
            for peer in rule["to"]:
                if "ipBlock" in peer:
                    assert "169.254.0.0/16" in peer["ipBlock"]["except"]



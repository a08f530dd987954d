"""deploy/compose.yaml and what it mounts agree with the programs and with one another."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "k8s/tests"))
from manifests import BIN, help_of, says, variables_of  # noqa: E402

DEPLOY = ROOT / "deploy"
COMPOSE = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
PROGRAMS = {name: service for name, service in SERVICES.items() if service.get("command", [""])[0].startswith("dnd")}


def test_each_service_of_the_workspace_is_there():
    services = {folder.name for folder in (ROOT / "services").iterdir()} | {"gateway"}
    assert {name: service["command"][0] for name, service in PROGRAMS.items()} == {name: f"dnd-{name}" for name in services}


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_know_their_flags_and_variables(name):
    service = PROGRAMS[name]
    said = help_of(service["command"][0])
    if said is None:
        pytest.skip(f"there is no {name} yet")
    for flag in [word for word in service["command"] if word.startswith("--")]:
        assert says(said, flag), flag
    # Most are the same for all, so each is right if any program knows it.
    every = [help_of(other["command"][0]) or "" for other in PROGRAMS.values()]
    for variable in service["environment"]:
        assert any(says(other, variable) for other in every) or variable.startswith("AWS_"), variable
    for variable, value in service["environment"].items():
        if value.startswith("http://") and variable.startswith("DND_"):
            assert value == f"http://{variable.removeprefix('DND_').lower()}:50051"


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_take_the_configuration_that_they_are_given(name):
    service = PROGRAMS[name]
    program, *flags = service["command"]
    done = subprocess.run([BIN / program, *flags, "--print-config"], env=service["environment"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert variables_of(program) & service["environment"].keys() <= set(re.findall(r"  # env (\w+)$", done.stdout, re.M)), done.stdout


@pytest.mark.parametrize("name", PROGRAMS)
def test_programs_are_confined(name):
    service = PROGRAMS[name]
    assert service["read_only"] and service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    grace = int(re.search(r"--grace.*?\[default: (\d+)\]", help_of("dnd-orchestrator"), re.S)[1])
    assert int(service["stop_grace_period"].removesuffix("s")) >= grace + 10


def test_ports_are_open_to_this_machine_alone():
    assert all(port.startswith("127.0.0.1:") for service in SERVICES.values() for port in service.get("ports", []))


def test_images_have_versions_and_what_is_mounted_is_there():
    for name, service in SERVICES.items():
        assert re.search(r":(?!latest)[\w.}-]*\d[\w.}-]*$", service["image"]), name
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (DEPLOY / source).exists(), source
            else:
                assert source in COMPOSE["volumes"], source
        for config in service.get("configs", []):
            assert config["source"] in COMPOSE["configs"]
        assert set(service.get("depends_on", [])) <= SERVICES.keys()


def test_prometheus_asks_every_program():
    scraped = yaml.safe_load((DEPLOY / "telemetry/prometheus.yaml").read_text())["scrape_configs"][0]["dns_sd_configs"][0]
    assert sorted(scraped["names"]) == sorted(PROGRAMS)
    assert all(service["environment"].get("DND_ADMIN") == f"0.0.0.0:{scraped['port']}" for service in PROGRAMS.values())


def test_the_collector_takes_what_the_programs_send_and_sends_it_to_the_viewer():
    collector = yaml.safe_load((DEPLOY / "telemetry/collector.yaml").read_text())
    port = collector["receivers"]["otlp"]["protocols"]["grpc"]["endpoint"].split(":")[1]
    assert {service["environment"]["OTEL_EXPORTER_OTLP_ENDPOINT"] for service in PROGRAMS.values()} == {f"http://collector:{port}"}
    assert collector["exporters"]["otlp"]["endpoint"].split(":")[0] in SERVICES
    pipeline = collector["service"]["pipelines"]["traces"]
    assert set(pipeline["processors"]) == collector["processors"].keys()


def test_an_exemplar_leads_to_a_trace_that_is_kept():
    assert "--enable-feature=exemplar-storage" in SERVICES["prometheus"]["command"]
    sources = {source["uid"]: source for source in yaml.safe_load((DEPLOY / "telemetry/grafana/datasources.yaml").read_text())["datasources"]}
    [leads] = sources["prometheus"]["jsonData"]["exemplarTraceIdDestinations"]
    assert sources[leads["datasourceUid"]]["type"] == "jaeger"
    assert f'"{leads["name"]}"' in (ROOT / "crates/mesh/src/telemetry.rs").read_text(), "the label that the programs write"
    # Whether a trace is taken is decided where it begins: one that was thrown away later would have left its id.
    for service in PROGRAMS.values():
        assert service["environment"]["OTEL_TRACES_SAMPLER"].startswith("parentbased_")
    collector = yaml.safe_load((DEPLOY / "telemetry/collector.yaml").read_text())
    assert not [name for name in collector["processors"] if "sampl" in name]

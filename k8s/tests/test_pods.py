"""What holds for every pod of every overlay: how it is confined, what it is given, and that the program in it knows all that it is told."""

import re
import subprocess
from urllib.parse import urlsplit

import pytest
from manifests import (
    BATCH, BIN, MESHES, OVERLAYS, ROOT, built, configured, containers, environment, help_of, labels_of, matches, name_of, named, of_kind, program_of, says,
    variables_of, workloads,
)  # fmt: skip

ALL = [*OVERLAYS, BATCH]
SERVICES = sorted(folder.name for folder in (ROOT / "services").iterdir()) + ["gateway"]
# Seconds: what the end of a program takes beside --grace, by the constants of the code.
ENDS = {"crates/mesh/src/program.rs": "AT_THE_END", "crates/mesh/src/telemetry.rs": "LAST_SPANS"}


def every(overlays=ALL):
    """Each workload, with what to call it in a failure."""
    return [pytest.param(overlay, workload, id=f"{overlay}-{workload['metadata']['name']}") for overlay in overlays for workload in workloads(overlay)]


def served(overlays=OVERLAYS):
    return [case for case in every(overlays) if case.values[1]["kind"] == "Deployment"]


@pytest.mark.parametrize("overlay", MESHES)
def test_each_service_of_the_workspace_has_what_it_needs(overlay):
    for service in SERVICES:
        deployment = named(overlay, "Deployment", service)
        assert name_of(deployment) == service
        assert deployment["spec"]["template"]["spec"]["serviceAccountName"] == service
        assert containers(deployment)[0]["command"][0] == f"dnd-{service}"
        for kind in ["Service", "ServiceAccount", "PodDisruptionBudget"]:
            named(overlay, kind, service)
        headless = named(overlay, "Service", service)["spec"].get("clusterIP") == "None"
        assert headless == (service != "gateway"), "callers balance over a service's replicas themselves; before the gateway stand others"
    assert {name_of(workload) for workload in workloads(overlay)} - {"fetch-models"} == set(SERVICES)


@pytest.mark.parametrize("overlay", ALL)
def test_no_secret_is_in_the_manifests(overlay):
    assert not of_kind(overlay, "Secret")


@pytest.mark.parametrize(("overlay", "workload"), every())
def test_pods_are_confined(overlay, workload):
    pod = workload["spec"]["template"]["spec"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & pod.keys()
    assert all(not {"hostPath"} & volume.keys() for volume in pod["volumes"])
    for container in containers(workload):
        context = container["securityContext"]
        assert context == {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
        assert all("hostPort" not in port for port in container.get("ports", []))


@pytest.mark.parametrize(("overlay", "workload"), every())
def test_containers_have_requests_and_limits(overlay, workload):
    for container in containers(workload):
        resources = container["resources"]
        for of in ["requests", "limits"]:
            assert {"cpu", "memory"} <= resources[of].keys(), f"{container['name']} has no {of}"
    # Threads are made for the limit, so that a share of a card's owner must be whole.
    if "nvidia.com/gpu" in containers(workload)[0]["resources"]["limits"]:
        assert workload["spec"]["template"]["spec"]["nodeSelector"] == {"nvidia.com/gpu.present": "true"}
        assert environment(overlay, containers(workload)[0])["DND_PROVIDER"] == "cuda"
        assert containers(workload)[0]["image"].endswith("-cuda")


def test_the_models_of_one_card_have_limits_that_leave_room_for_cuda():
    environ = environment("single-gpu", containers(named("single-gpu", "Deployment", "mesh"))[0])
    limits = dict(limit.split("=") for limit in environ["DND_GPU_MEMORY_FOR"].split(","))
    assert sorted(limits) == ["captioner", "clip", "diffusion", "summarizer", "target"]
    targets = int(environ["DND_TARGETS"])
    together = sum(int(limit) * (targets if model == "target" else 1) for model, limit in limits.items())
    assert together == 21504 and together + 400 * (1 + targets) <= 23034, "as the manifest says"


@pytest.mark.parametrize(("overlay", "workload"), every())
def test_images_are_this_project_s_by_a_version(overlay, workload):
    version = re.search(r'^version = "(.*)"', (ROOT / "Cargo.toml").read_text(), re.M)[1]
    for container in containers(workload):
        assert re.fullmatch(rf"(.*/)?dnd:{re.escape(version)}(-cuda|-sketch)?", container["image"]), container["image"]


@pytest.mark.parametrize(("overlay", "workload"), every())
def test_volumes_claims_and_maps_are_there(overlay, workload):
    volumes = {volume["name"]: volume for volume in workload["spec"]["template"]["spec"]["volumes"]}
    used = {mount["name"] for container in containers(workload) for mount in container.get("volumeMounts", [])}
    assert used == volumes.keys(), "each volume is mounted, and each mount has its volume"
    for container in containers(workload):
        paths = [mount["mountPath"] for mount in container["volumeMounts"]]
        assert len(paths) == len(set(paths))
    for volume in volumes.values():
        if "persistentVolumeClaim" in volume and overlay != BATCH:
            named(overlay, "PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"])
        if "configMap" in volume:
            named(overlay, "ConfigMap", volume["configMap"]["name"])


@pytest.mark.parametrize(("overlay", "workload"), every())
def test_programs_know_their_flags_and_variables(overlay, workload):
    for container in containers(workload):
        program, command = program_of(container), container["command"]
        said = help_of(*program)
        environ = environment(overlay, container)
        for variable in re.findall(r"\$\((\w+)\)", " ".join(command)):
            assert variable in environ or variable == "JOB_COMPLETION_INDEX", variable
        for flag in (word for word in command if word.startswith("--")):
            assert says(said, flag), f"{' '.join(program)} has no {flag}"
        # One map serves all, so a variable is right if any program knows it; those of the container itself are for its own program.
        own = {variable["name"] for variable in container.get("env", [])}
        for name in environ:
            known = says(said, name) if name in own else any(says(help_of(other.name) or "", name) for other in sorted(BIN.glob("dnd-*")) if other.suffix == "")
            by_others = name.startswith("AWS_") or name == "HF_TOKEN"
            assert known or by_others or f"$({name})" in " ".join(command), f"{' '.join(program)} knows no {name}"


@pytest.mark.parametrize(("overlay", "workload"), every())
def test_programs_take_the_configuration_that_they_are_given(overlay, workload):
    for container in containers(workload):
        done = configured(overlay, container)
        assert done.returncode == 0, f"{' '.join(container['command'])}: {done.stderr}"
        # What the environment says of the program's options counts: no flag of the command hides it.
        known = variables_of(*program_of(container)) & environment(overlay, container).keys()
        assert known <= set(re.findall(r"  # env (\w+)$", done.stdout, re.M)), done.stdout


@pytest.mark.parametrize(("overlay", "workload"), served())
def test_ports_are_those_that_the_program_listens_on(overlay, workload):
    container = containers(workload)[0]
    environ = environment(overlay, container)
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    main = "http" if name_of(workload) == "gateway" else "grpc"
    assert ports == {main: int(environ["DND_LISTEN"].split(":")[1]), "admin": int(environ["DND_ADMIN"].split(":")[1])}
    service = named(overlay, "Service", name_of(workload))["spec"]
    assert matches({"matchLabels": service["selector"]}, labels_of(workload))
    assert {port["name"]: port["port"] for port in service["ports"]} == ports, "a headless service's ports are its pods'"
    assert all(port["targetPort"] == port["name"] for port in service["ports"])


@pytest.mark.parametrize("overlay", MESHES)
def test_addresses_lead_to_services_and_are_encrypted_where_they_are(overlay):
    encrypted = any(resource["kind"] == "Issuer" for resource in built(overlay))
    environ = environment(overlay, containers(named(overlay, "Deployment", "orchestrator"))[0])
    assert encrypted == ("DND_TLS_CERT" in environ) and encrypted != ("DND_INSECURE" in environ), "hops are either encrypted, or said not to be"
    addresses = {name: urlsplit(value) for name, value in environ.items() if (value or "").startswith("http") and name.startswith("DND_")}
    assert {name.removeprefix("DND_").lower() for name in addresses} == set(SERVICES) - {"gateway"}
    protocols = {service["spec"]["ports"][0]["appProtocol"] for service in of_kind(overlay, "Service")}
    assert protocols == ({"https"} if encrypted else {"kubernetes.io/h2c", "http"})
    for name, address in addresses.items():
        assert address.hostname == name.removeprefix("DND_").lower()
        assert address.scheme == ("https" if encrypted else "http")
        assert address.port in [port["port"] for port in named(overlay, "Service", address.hostname)["spec"]["ports"]]


@pytest.mark.parametrize(("overlay", "workload"), served())
def test_probes_ask_the_admin_port(overlay, workload):
    container = containers(workload)[0]
    said = help_of(*program_of(container))
    assert says(said, "--admin"), "it has such a port"
    assert container["startupProbe"]["httpGet"] == {"path": "/readyz", "port": "admin"}
    assert container["livenessProbe"]["httpGet"] == {"path": "/livez", "port": "admin"}
    assert container["readinessProbe"]["grpc"] == {"port": 9090}
    assert container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"] >= 600, "a model of gigabytes from a slow disk"
    code = "".join(path.read_text() for path in (ROOT / "crates/mesh/src").glob("*.rs"))
    assert '"/readyz"' in code and '"/livez"' in code


@pytest.mark.parametrize(("overlay", "workload"), served())
def test_the_grace_period_covers_the_drain(overlay, workload):
    container, pod = containers(workload)[0], workload["spec"]["template"]["spec"]
    said = help_of(*program_of(container)) or help_of("dnd-orchestrator")
    grace = int(environment(overlay, container)["DND_GRACE"])
    assert f"[default: {grace}]" in re.search(r"--grace.*?\[default: \d+\]", said, re.S)[0], "the code's own default"
    ends = 0
    for file, constant in ENDS.items():
        found = re.search(rf"const {constant}: Duration = Duration::from_secs\((\d+)\)", (ROOT / file).read_text())
        ends += int(found[1]) if found else 0
    assert ends > 0
    before = container["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod["terminationGracePeriodSeconds"] >= before + grace + ends


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_whatever_chooses_pods_finds_some(overlay):
    labels = [labels_of(workload) for workload in workloads(overlay)]
    for resource in built(overlay):
        spec, name = resource.get("spec", {}), f"{resource['kind']} {resource['metadata']['name']}"
        if resource["kind"] in ("PodDisruptionBudget", "NetworkPolicy"):
            selector = spec["selector"] if "selector" in spec else spec["podSelector"]
            assert any(matches(selector, own) for own in labels), name
        if "scaleTargetRef" in spec:
            named(overlay, "Deployment", spec["scaleTargetRef"]["name"])
    for workload in workloads(overlay):
        for spread in workload["spec"]["template"]["spec"].get("topologySpreadConstraints", []):
            assert matches(spread["labelSelector"], labels_of(workload))
            assert set(spread["matchLabelKeys"]) - {"pod-template-hash"} <= labels_of(workload).keys()
        if "priorityClassName" in workload["spec"]["template"]["spec"]:
            named(overlay, "PriorityClass", workload["spec"]["template"]["spec"]["priorityClassName"])


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_what_scales_a_service_is_alone_in_setting_its_replicas(overlay):
    scaled = [resource["spec"]["scaleTargetRef"]["name"] for resource in of_kind(overlay, "HorizontalPodAutoscaler", "ScaledObject")]
    assert len(scaled) == len(set(scaled))
    for name in scaled:
        assert "replicas" not in named(overlay, "Deployment", name)["spec"], f"{name}: each apply would undo what the autoscaler set"


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_namespace_enforces_the_strictest_standard(overlay):
    labels = named(overlay, "Namespace", "dnd")["metadata"]["labels"]
    assert labels["pod-security.kubernetes.io/enforce"] == "restricted"
    cluster = {"Namespace", "PriorityClass"}
    assert all(resource["kind"] in cluster or resource["metadata"]["namespace"] == "dnd" for resource in built(overlay))


def test_an_orchestrator_that_keeps_jobs_in_a_file_is_alone():
    for overlay in MESHES:
        orchestrator = named(overlay, "Deployment", "orchestrator")["spec"]
        if "DND_STORE" in environment(overlay, containers(named(overlay, "Deployment", "orchestrator"))[0]):
            assert orchestrator["replicas"] >= 2
        else:
            assert orchestrator.get("replicas", 1) == 1 and orchestrator["strategy"] == {"type": "Recreate"}


def test_batch_runs_ask_the_orchestrator():
    for job in workloads(BATCH):
        address = urlsplit(environment(BATCH, containers(job)[0])["DND_ENDPOINT"])
        assert address.port in [port["port"] for port in named("local", "Service", address.hostname)["spec"]["ports"]]
        assert address.hostname == "orchestrator" and name_of(job) == "batch"


def test_slices_of_a_batch_run_are_units_that_dnd_takes():
    slices = named(BATCH, "Job", "slices")
    command = containers(slices)[0]["command"]
    assert slices["spec"]["completionMode"] == "Indexed"
    for index in [0, 7, slices["spec"]["completions"] - 1]:
        units = command[command.index("--units") + 1].replace("$(JOB_COMPLETION_INDEX)", str(index))
        assert [int(bound) for bound in units.split("-")] == [100 * index, 100 * index + 99]
        asked = ["--target", "nowhere.onnx", "--layer", "l", "--units", units, "--images", "nowhere", "--out", "nowhere"]
        done = subprocess.run([BIN / "dnd", "dissect", *asked], capture_output=True, text=True, cwd="/")
        assert done.returncode == 2 and "nowhere.onnx" in done.stderr, "the units are taken, and the network is missed: " + done.stderr

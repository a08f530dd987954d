"""What the tests share: the overlays as `kubectl kustomize` builds them, and what the programs say of themselves."""

import functools
import re
import subprocess
import tomllib
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[2]
K8S = ROOT / "k8s"
BIN = ROOT / "target/debug"
BATCH = "batch"
OVERLAYS = sorted(folder.name for folder in (K8S / "overlays").iterdir())
# Those in which each service has pods of its own.
MESHES = [name for name in OVERLAYS if name != "single-gpu"]


@functools.cache
def built(overlay):
    """An overlay's resources."""
    folder = K8S / overlay if overlay == BATCH else K8S / "overlays" / overlay
    done = subprocess.run(["kubectl", "kustomize", folder], capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr, done.stderr
    return list(yaml.load_all(done.stdout, Loader=yaml.CSafeLoader))


def of_kind(overlay, *kinds):
    return [resource for resource in built(overlay) if resource["kind"] in kinds]


def named(overlay, kind, name):
    """The resource of that kind and name; without one, an error that says so."""
    found = [resource for resource in of_kind(overlay, kind) if resource["metadata"]["name"] == name]
    assert found, f"{overlay}: no {kind} {name}"
    return found[0]


def workloads(overlay):
    """Everything that has pods."""
    found = [resource for resource in built(overlay) if "template" in resource.get("spec", {})]
    assert {resource["kind"] for resource in found} <= {"Deployment", "StatefulSet", "Job"}
    return found


def containers(workload):
    pod = workload["spec"]["template"]["spec"]
    return pod["containers"] + pod.get("initContainers", [])


def environment(overlay, container):
    """A container's environment: what maps and itself give by value, and None for what is only referred to."""
    values = {}
    for source in container.get("envFrom", []):
        values |= named(overlay, "ConfigMap", source["configMapRef"]["name"])["data"]
    for variable in container.get("env", []):
        values[variable["name"]] = variable.get("value")
    return values


@functools.cache
def help_of(*command):
    """What a program's --help says."""
    program = BIN / command[0]
    assert program.exists(), f"{command[0]} is no program of this project"
    done = subprocess.run([program, *command[1:], "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@functools.cache
def variables_of(*command):
    """The variables that options of a program are read from."""
    done = subprocess.run([BIN / command[0], "--print-config=options"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    options = tomllib.loads(done.stdout)["option"]
    return {option["variable"] for option in options if option["command"] == "-".join(command) and "variable" in option}


def configured(overlay, container):
    """Runs a container's command with `--print-config` in its own environment; gives what it did."""
    environ = {name: value or "of-a-secret" for name, value in environment(overlay, container).items()} | {"JOB_COMPLETION_INDEX": "0"}
    words = [re.sub(r"\$\((\w+)\)", lambda name: environ[name[1]], word) for word in container["command"]]
    return subprocess.run([BIN / words[0], *words[1:], "--print-config"], env=environ, capture_output=True, text=True)


def program_of(container):
    """The part of a container's command that names a program: `dnd models pull` has three words."""
    command = container["command"]
    words = 1 if command[0] != "dnd" else next(i for i, word in enumerate([*command, "-"]) if i and (word.startswith(("-", "$"))))
    return tuple(command[:words])


def says(text, word):
    """Whether a text has a word, and not as a part of another one."""
    return re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text) is not None


def matches(selector, labels):
    """Whether labels are what a selector asks for."""
    wanted = all(labels.get(key) == value for key, value in selector.get("matchLabels", {}).items())
    for expression in selector.get("matchExpressions", []):
        assert expression["operator"] == "In", expression
        wanted = wanted and labels.get(expression["key"]) in expression["values"]
    return wanted


def labels_of(workload):
    return workload["spec"]["template"]["metadata"]["labels"]


def name_of(workload):
    return labels_of(workload)["app.kubernetes.io/name"]

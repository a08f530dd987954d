"""Every resource of every overlay is what its kind's schema allows, and has no field that it does not know."""

import functools
import json
import os
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
from kubernetes_validate import utils
from manifests import BATCH, OVERLAYS, built

TOOLS = Path(os.environ["PYTHONPATH"]).parent
NEWEST = utils.all_versions()[-3:]
# Where the types of custom resources are.
PACKAGES = {
    "cert-manager.io": "cert-manager",
    "gateway.networking.k8s.io": "gateway-api",
    "keda.sh": "keda",
    "monitoring.coreos.com": "prometheus-operator",
}
# The schemas are read from the disk at each call otherwise.
utils.schema_contents = functools.cache(utils.schema_contents)


def all_resources():
    """Each once, however many overlays have it."""
    return list({json.dumps(resource): resource for overlay in [*OVERLAYS, BATCH] for resource in built(overlay)}.values())


def is_custom(resource):
    return resource["apiVersion"].split("/")[0] in PACKAGES


@pytest.mark.parametrize("version", NEWEST)
def test_resources_hold_to_the_newest_schemas(version):
    for resource in all_resources():
        if not is_custom(resource):
            try:
                kubernetes_validate.validate(resource, version, strict=True)
            except kubernetes_validate.ValidationError as wrong:
                pytest.fail(f"{resource['kind']} {resource['metadata']['name']}: {'/'.join(map(str, wrong.path))}: {wrong.message}")


@pytest.mark.skipif(not (TOOLS / "node_modules/.bin/tsc").exists(), reason="npm is missing: it fetches the types of custom resources (Debian: apt install npm)")
def test_custom_resources_hold_to_their_types(tmp_path):
    imports, values = {}, []
    for resource in filter(is_custom, all_resources()):
        group, version = resource["apiVersion"].split("/")
        kind = resource["kind"]
        imports[kind] = f'import type {{ I{kind} }} from "@kubernetes-models/{PACKAGES[group]}/{group}/{version}/{kind}";'
        values.append(f"const _{len(values)}: I{kind} = {json.dumps(resource)};")
    assert len(imports) >= 6, "cert-manager's, the Gateway API's, KEDA's and Prometheus' are among them"
    source = tmp_path / "custom.ts"
    source.write_text("\n".join([*imports.values(), *values]))
    (tmp_path / "node_modules").symlink_to(TOOLS / "node_modules")
    options = ["--noEmit", "--strict", "--skipLibCheck", "--preserveSymlinks", "--module", "nodenext", "--moduleResolution", "nodenext", "--target", "es2022"]
    done = subprocess.run([TOOLS / "node_modules/.bin/tsc", *options, source], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stdout

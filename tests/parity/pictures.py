"""Pictures as Pillow and transformers prepare them: `python tests/parity/pictures.py` makes crates/onnx/tests/goldens/pictures anew;
with a folder it makes the same of whole photographs there (needs scikit-image and foolbox)."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from skimage import data as photographs
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

GOLDENS = Path(__file__).resolve().parents[2] / "crates/onnx/tests/goldens/pictures"
FILTERS = {"nearest": 0, "lanczos": 1, "bilinear": 2, "bicubic": 3}
NORMAL = {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}


def configs(height: int, width: int, crop: int, edge: int) -> list[tuple[type, dict]]:
    """Each kind of `preprocessor_config.json`, with every filter."""
    made = []
    for resample in FILTERS.values():
        made.append((BlipImageProcessorPil, {"size": {"height": height, "width": width}, "resample": resample, **NORMAL}))
        made.append((CLIPImageProcessorPil, {
            "size": {"shortest_edge": edge}, "resample": resample, "do_center_crop": True, "crop_size": {"height": crop, "width": crop}, **NORMAL,
        }))
    made.append((ViTImageProcessorPil, {
        "size": {"height": height, "width": width}, "resample": 2, "rescale_factor": 1 / 127.5, "do_normalize": False,
    }))
    made.append((ViTImageProcessorPil, {
        "size": {"height": height, "width": width}, "resample": 3, "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5],
    }))
    return made


def png(array: np.ndarray) -> bytes:
    out = io.BytesIO()
    Image.fromarray(array).save(out, "PNG")
    return out.getvalue()


class Writer:
    """Sources beside `cases.json`, and all expected tensors one after the other in `tensors.f32`."""

    def __init__(self, folder: Path):
        self.folder, self.cases, self.tensors, self.at = folder, [], io.BytesIO(), 0
        folder.mkdir(parents=True, exist_ok=True)

    def source(self, name: str, encoded: bytes) -> None:
        (self.folder / name).write_bytes(encoded)

    def prepared(self, name: str, rgb: np.ndarray, kinds: list[tuple[type, dict]]) -> None:
        """What the processors make of the decoded picture `rgb`, which is `name` in the folder."""
        for processor, config in kinds:
            tensor = np.asarray(processor(**config)(Image.fromarray(rgb), return_tensors="np")["pixel_values"][0], np.float32)
            self.tensors.write(tensor.tobytes())
            self.cases.append({"source": name, "config": config, "processor": processor.__name__, "offset": self.at, "shape": list(tensor.shape)})
            self.at += tensor.size

    def close(self) -> None:
        (self.folder / "cases.json").write_text(json.dumps(self.cases, indent=1) + "\n")
        (self.folder / "tensors.f32").write_bytes(self.tensors.getvalue())


def small(folder: Path) -> None:
    for old in folder.glob("*"):
        old.unlink()
    rng, writer = np.random.default_rng(0), Writer(folder)
    astronaut, cat = photographs.astronaut(), photographs.chelsea()
    sources = {
        "photograph": astronaut[40:140, 160:280],
        "odd": cat[60:121, 100:197],
        "noise": (rng.random((31, 57, 3)) < 0.5).astype(np.uint8) * 255,
        "one": np.array([[[9, 200, 77]]], np.uint8),
        "column": rng.integers(0, 256, (9, 1, 3), dtype=np.uint8),
        "row": rng.integers(0, 256, (1, 7, 3), dtype=np.uint8),
        "tiny": rng.integers(0, 256, (2, 3, 3), dtype=np.uint8),
    }
    for name, rgb in sources.items():
        writer.source(f"{name}.png", png(rgb))
        # A row or a column brought to its shorter side is a ribbon: those are squashed only.
        kinds = configs(height=11, width=17, crop=11, edge=14)
        writer.prepared(f"{name}.png", rgb, kinds if min(rgb.shape[:2]) > 1 or name == "one" else kinds[::2])
    writer.close()
    hard_cases(folder, cat[80:104, 150:182])


def hard_cases(folder: Path, rgb: np.ndarray) -> None:
    """Files of every mode, each with the pixels that Pillow reads: EXIF orientation applied, then `convert("RGB")`."""
    picture, read = Image.fromarray(rgb), {}

    def add(name: str, image: Image.Image, **options) -> None:
        out = io.BytesIO()
        image.save(out, Image.registered_extensions()[Path(name).suffix], **options)
        (folder / name).write_bytes(out.getvalue())
        pixels = np.asarray(ImageOps.exif_transpose(Image.open(out)).convert("RGB"))
        (folder / f"{name}.rgb").write_bytes(pixels.tobytes())
        read[name] = list(pixels.shape[:2])

    alpha = np.dstack([rgb, np.linspace(0, 255, rgb.shape[1]).astype(np.uint8) * np.ones((rgb.shape[0], 1), np.uint8)])
    add("grey.png", picture.convert("L"))
    add("grey-and-alpha.png", picture.convert("LA"))
    add("bilevel.png", picture.convert("1"))
    add("palette.png", picture.quantize(31))
    add("palette-transparent.png", picture.quantize(31), transparency=3)
    add("transparent.png", Image.fromarray(alpha))
    add("grey.jpg", picture.convert("L"), quality=92)
    add("colour.jpg", picture, quality=92, subsampling=0)
    add("subsampled.jpg", picture, quality=92, subsampling=2)
    add("progressive.jpg", picture, quality=92, subsampling=0, progressive=True)
    add("cmyk.jpg", picture.convert("CMYK"), quality=95)
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        add(f"turned-{orientation}.png", picture, exif=exif)
        if orientation in (3, 6):
            add(f"turned-{orientation}.jpg", picture, exif=exif, quality=92, subsampling=0)
    other = Image.fromarray(255 - rgb)
    add("animated.gif", picture.quantize(63), save_all=True, append_images=[other.quantize(63)], duration=100)
    add("animated.webp", picture, save_all=True, append_images=[other], lossless=True, duration=100)
    add("still.webp", picture, lossless=True)
    add("plain.bmp", picture)
    add("plain.tif", picture)
    add("plain.ppm", picture)
    (folder / "read.json").write_text(json.dumps(read, indent=1) + "\n")
    sixteen(folder, rgb)


def sixteen(folder: Path, rgb: np.ndarray) -> None:
    """A 16-bit grey PNG, values up to 65535, with the values themselves: Pillow's `convert("RGB")` clips such pictures at 255, which nobody wants."""
    values = rgb[..., 1].astype(np.uint16) * 257 - np.arange(rgb.shape[1], dtype=np.uint16)[None, :] % 200
    Image.fromarray(values).save(folder / "sixteen-bit-grey.png")
    (folder / "sixteen-bit-grey.png.u16").write_bytes(values.astype("<u2").tobytes())


def whole(folder: Path) -> None:
    """Photographs at the sizes that networks take."""
    import foolbox

    writer = Writer(folder)
    pictures = {f"{n}": getattr(photographs, n)() for n in ("astronaut", "chelsea", "coffee", "rocket")}
    for file in sorted((Path(foolbox.__file__).parent / "data").glob("imagenet_*.jpg"))[:12]:
        pictures[file.stem] = np.asarray(Image.open(file).convert("RGB"))
        writer.source(file.name, file.read_bytes())  # for the decoders' own comparison
    for name, rgb in pictures.items():
        writer.source(f"{name}.png", png(rgb))
        writer.prepared(f"{name}.png", rgb, configs(height=384, width=384, crop=224, edge=256))
    writer.close()


if __name__ == "__main__":
    whole(Path(sys.argv[1])) if len(sys.argv) > 1 else small(GOLDENS)

"""A target whose units are known: `python -m train.planted` builds and exports it; with `evaluate` it measures how well each unit keeps to its concept.

A convolutional network of which no weight is learnt: each follows from the definition of a colour, a pattern or a shape. Its three layers give maps of
32 x 32 in 0..1, one for each unit, which cover the whole of each thing that the unit stands for:

- `colour`: how near each place's colour is to one of eleven.
- `pattern`: five patterns, by the energies of gratings in the whiteness of the picture; six shapes, by comparing the mask of each colour with drawn ones.
- `mixture`: a pattern or a shape in one colour; half of them are combinations that no trained model of the suite has seen.

One unit each of the first two layers is dead.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from PIL import Image, ImageFilter
from scipy import ndimage
from torch import nn
from torch.nn import functional as F

from world import draw, scene, words
from world.words import Concept

from . import export, summarizer
from .common import SKETCH, Box, one_thread, write_json

FOLDER = SKETCH / "targets" / "planted"
COLOURS, PATTERNS, SHAPES = list(scene.COLOURS), list(scene.PATTERNS), list(scene.SHAPES)
WHITE = COLOURS.index("white")

MIXED = [
    *(Concept(colour=c, pattern=p) for c, p in sorted(scene.WITHHELD_PATTERNS)),
    *(Concept(colour=c, shape=s) for c, s in sorted(scene.WITHHELD_SHAPES)),
    *(Concept(colour=c, pattern=p) for c, p in (
        ("black", "checks"), ("blue", "vertical stripes"), ("brown", "polka dots"), ("green", "horizontal stripes"), ("pink", "diagonal stripes"),
        ("red", "polka dots"),
    )),
    *(Concept(colour=c, shape=s) for c, s in (
        ("black", "cross"), ("blue", "ring"), ("orange", "triangle"), ("purple", "square"), ("red", "star"), ("yellow", "circle"),
    )),
]
UNITS: dict[str, list[Concept | None]] = {
    "colour": [*(Concept(colour=c) for c in COLOURS), None],
    "pattern": [*(Concept(pattern=p) for p in PATTERNS), *(Concept(shape=s) for s in SHAPES), None],
    "mixture": MIXED,
}
"""What each unit stands for; None for a dead one."""


def fixed_conv(weight: np.ndarray | torch.Tensor, bias: np.ndarray | torch.Tensor | None = None) -> nn.Conv2d:
    """A convolution with these weights (out, in, k, k) that keeps the picture's size."""
    weight = torch.as_tensor(weight, dtype=torch.float32)
    conv = nn.Conv2d(weight.shape[1], weight.shape[0], weight.shape[2], padding=weight.shape[2] // 2, bias=bias is not None)
    conv.weight.data = weight
    if bias is not None:
        conv.bias.data = torch.as_tensor(bias, dtype=torch.float32)
    return conv


def mean_around(x: torch.Tensor, side: int) -> torch.Tensor:
    """The mean of the square around each place; nothing lies outside the picture."""
    return F.avg_pool2d(x, side, 1, side // 2, count_include_pad=False)


def most_around(x: torch.Tensor, side: int) -> torch.Tensor:
    rows = F.max_pool2d(x, (1, side), 1, (0, side // 2))
    return F.max_pool2d(rows, (side, 1), 1, (side // 2, 0))


def least_around(x: torch.Tensor, side: int) -> torch.Tensor:
    return -most_around(-x, side)


def most_of_others(x: torch.Tensor) -> torch.Tensor:
    """For each channel the largest of the other channels."""
    channels = x.shape[1]
    return torch.stack([torch.cat([x[:, :i], x[:, i + 1 :]], dim=1).amax(1) for i in range(channels)], dim=1)


class Match(nn.Module):
    """Pictures to the share that each colour has in each pixel: a soft choice of the nearest."""

    TEMPERATURE = 600 / 255**2

    def __init__(self):
        super().__init__()
        colours = np.array(list(scene.COLOURS.values())) / 255
        # -|x - c|^2 / t without |x|^2, which is the same for all colours.
        self.near = fixed_conv(2 * colours[:, :, None, None] / self.TEMPERATURE, -(colours**2).sum(1) / self.TEMPERATURE)

    def forward(self, pictures: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.near(pictures), dim=1)


class Colour(nn.Module):
    """A colour where it fills most of the neighbourhood: not edges, where two colours blend to a third."""

    def __init__(self):
        super().__init__()
        weight = np.concatenate([1.6 * np.eye(len(COLOURS)), np.zeros((1, len(COLOURS)))])
        self.units = fixed_conv(weight[:, :, None, None], [-0.6] * len(COLOURS) + [0])

    def forward(self, shares: torch.Tensor) -> torch.Tensor:
        return self.units(mean_around(F.avg_pool2d(shares, 2), 3)).clamp(0, 1)


class Gratings(nn.Module):
    """How much of each pattern there is around each place. Patterns are drawn on white, so that where white is tells them all apart.

    Lengths are in places of 2 pixels.
    """

    PERIODS, SPREAD, REACH = (3.6, 4.2, 4.9, 5.9, 7.25), 2.25, 4

    def __init__(self):
        super().__init__()
        y, x = np.mgrid[-self.REACH : self.REACH + 1, -self.REACH : self.REACH + 1].astype(float)
        near = np.exp(-(x**2 + y**2) / (2 * self.SPREAD**2))
        filters = []
        for along in (y, x, (x + y) / np.sqrt(2), (x - y) / np.sqrt(2)):
            for period in self.PERIODS:
                for phase in (0, np.pi / 2):
                    wave = near * np.cos(2 * np.pi * along / period + phase)
                    filters.append((wave - near * wave.sum() / near.sum()) / (near.sum() / 2))
        self.waves = fixed_conv(np.stack(filters)[:, None])

    def forward(self, shares: torch.Tensor) -> torch.Tensor:
        waves = self.waves(F.avg_pool2d(shares[:, WHITE : WHITE + 1], 2)).unflatten(1, (4, len(self.PERIODS), 2))
        energy = (waves.square().sum(3) + 1e-6).sqrt().amax(2)
        down, across, falling, rising = energy.unbind(1)
        straight, slanted = torch.maximum(down, across), torch.maximum(falling, rising)
        found = torch.stack([
            (down - torch.maximum(across, slanted) - 0.08) / 0.3,
            (across - torch.maximum(down, slanted) - 0.08) / 0.3,
            (falling - torch.maximum(rising, straight) - 0.08) / 0.3,
            (torch.minimum(down, across) - slanted - 0.02) / 0.13,
            (torch.minimum(falling, rising) - straight - 0.04) / 0.15,
        ], dim=1).clamp(0, 1)
        # An edge or a corner is a short piece of a pattern: what does not go on for some pixels is none.
        return most_around(least_around(mean_around(found, 3), 5), 7)


def _template(shape: str, radius: float, side: int) -> np.ndarray:
    """The shape's mask in the middle of side x side places."""
    fine = scene.SIDE // side
    middle = side * fine / 2
    mask = draw.thing_mask(scene.Thing(shape, "large", scene.Fill("black"), middle, middle, radius * fine))[: side * fine, : side * fine]
    return mask.reshape(side, fine, side, fine).mean(axis=(1, 3))


class Compare(nn.Module):
    """How well masks agree with each shape at several sizes: 1 less the squared difference, as a part of the shape, over the part that is allowed.

    The squared difference of a mask m and a template t within a window w is a sum of convolutions: of m^2 with w, of m with -2 w t, and a constant.
    """

    ALLOWED = 0.22

    def __init__(self, radii: tuple[float, ...]):
        super().__init__()
        side = 2 * int(np.ceil(1.25 * radii[-1] + 0.4)) + 1
        distance = np.hypot(*(np.mgrid[:side, :side] - (side - 1) / 2))
        templates = np.stack([[_template(s, r, side) for s in SHAPES] for r in radii])
        windows = np.stack([np.clip(1.25 * r + 1.3 - distance, 0, 1) for r in radii])[:, None]
        areas = templates.sum(axis=(2, 3))
        self.radii = radii
        self.overlap = fixed_conv((windows * templates / areas[..., None, None]).reshape(-1, 1, side, side))
        self.energy = fixed_conv(windows)
        self.register_buffer("areas", torch.tensor(areas, dtype=torch.float32)[..., None, None])
        self.register_buffer("constant", torch.tensor((windows * templates**2).sum(axis=(2, 3)) / areas, dtype=torch.float32)[..., None, None])

    def agreement(self, overlap: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        difference = self.energy(masks.square()).unsqueeze(2) / self.areas - 2 * overlap + self.constant
        return (1 - difference / self.ALLOWED).clamp(min=0)

    def forward(self, shares: torch.Tensor, patterned: bool) -> torch.Tensor:
        """Shares of the colours (N, colours, H, W) to the shapes found of each, over all of the shape; the best of the sizes (N, colours, shapes, H, W).

        A shape is plain, or where patterns are asked for, of its colour and white together, with some of both.
        """
        masks = shares.flatten(0, 1).unsqueeze(1)
        overlap = self.overlap(masks).unflatten(1, (len(self.radii), len(SHAPES)))
        found = self.agreement(overlap, masks)
        if patterned:
            colours = shares.shape[1]
            white = shares[:, WHITE : WHITE + 1]
            white_overlap = overlap.unflatten(0, (-1, colours))[:, WHITE : WHITE + 1]
            both = (overlap.unflatten(0, (-1, colours)) + white_overlap).flatten(0, 1)
            agreed = self.agreement(both, (shares + white).flatten(0, 1).unsqueeze(1))
            found = torch.maximum(found, torch.minimum(agreed, ((overlap - 0.15) * 6).clamp(0, 1)))
        best = None
        for i, radius in enumerate(self.radii):
            over = most_around(found[:, i], 2 * round(radius + 0.7) + 1)
            best = over if best is None else torch.maximum(best, over)
        return best.unflatten(0, (-1, shares.shape[1]))


class Shapes(nn.Module):
    """Each shape in each colour (N, colours, shapes, 32, 32)."""

    def __init__(self):
        super().__init__()
        # In places of 2 and of 4 pixels. Small things are never patterned; those of the last sizes fill a crop.
        self.small, self.large, self.largest = Compare((4.0, 4.7)), Compare((3.65, 4.05, 4.5, 5.0, 5.6)), Compare((6.3, 7.2))

    def forward(self, shares: torch.Tensor) -> torch.Tensor:
        quarter = F.avg_pool2d(shares, 4)
        small = self.small(F.avg_pool2d(shares, 2), patterned=False)
        large = torch.maximum(self.large(quarter, patterned=True), self.largest(quarter, patterned=True))
        large = F.interpolate(large.flatten(1, 2), scale_factor=2, mode="nearest").unflatten(1, (len(COLOURS), len(SHAPES)))
        found = torch.maximum(small, large)
        # Shapes are alike to some degree, and the hole of a ring is a circle: of what is found in one place the best counts.
        best = found.amax(1)
        ring = SHAPES.index("ring")
        other_than_ring = torch.tensor([s != "ring" for s in SHAPES]).float()[:, None, None]
        clear = ((best - most_of_others(best)) * 8).clamp(0, 1) * (1 - 2 * best[:, ring : ring + 1] * other_than_ring).clamp(0, 1)
        return found * clear.unsqueeze(1)


class Pattern(nn.Module):
    """Patterns and shapes in any colour, and nothing."""

    def __init__(self):
        super().__init__()
        count = len(PATTERNS) + len(SHAPES)
        self.units = fixed_conv(np.concatenate([np.eye(count), np.zeros((1, count))])[:, :, None, None])

    def forward(self, patterns: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
        return self.units(torch.cat([patterns, shapes.amax(1)], dim=1)).clamp(0, 1)


class Mixture(nn.Module):
    """Both at once: a + b - 1 where a pattern and a colour are found, and a shape in its colour."""

    def __init__(self):
        super().__init__()
        # A pattern is of a colour where that is the most by far of what is not white, nor on the way to white as blurred edges are.
        colours = torch.tensor(list(scene.COLOURS.values())) / 255
        way = torch.linspace(0.15, 0.85, 8)[:, None]
        blends = torch.stack([colours[WHITE] * way + c * (1 - way) for c in colours])
        most = (3 * Match()(blends.permute(0, 2, 1)[..., None]).detach().mean(dim=(2, 3)) - 1).clamp(max=0)
        most[:, WHITE] = 0
        most.fill_diagonal_(1)
        self.most = fixed_conv(3.5 * most[:, :, None, None])

    def forward(self, shares: torch.Tensor, patterns: torch.Tensor, shapes: torch.Tensor) -> torch.Tensor:
        colours = most_around(self.most(mean_around(F.avg_pool2d(shares, 2), 5)).clamp(0, 1), 3)
        units = []
        for concept in MIXED:
            colour = COLOURS.index(concept.colour)
            if concept.shape:
                units.append(shapes[:, colour, SHAPES.index(concept.shape)])
            else:
                units.append(colours[:, colour] + patterns[:, PATTERNS.index(concept.pattern)] - 1)
        return torch.stack(units, dim=1).clamp(0, 1)


class Planted(nn.Module):
    """Pictures (N, 3, 64, 64) in 0..1 to how much there is of each unit's concept, layer by layer (N, units)."""

    def __init__(self):
        super().__init__()
        self.match, self.gratings, self.shapes = Match(), Gratings(), Shapes()
        self.colour, self.pattern, self.mixture = Colour(), Pattern(), Mixture()

    def maps(self, pictures: torch.Tensor) -> list[torch.Tensor]:
        shares = self.match(pictures)
        patterns, shapes = self.gratings(shares), self.shapes(shares)
        return [self.colour(shares), self.pattern(patterns, shapes), self.mixture(shares, patterns, shapes)]

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        return torch.cat([m.mean(dim=(2, 3)) for m in self.maps(pixel_values)], dim=1)


# What it is worth.


def export_network(network: Planted) -> None:
    file = FOLDER / "planted.onnx"
    inputs = {"pixel_values": torch.rand(3, 3, scene.SIDE, scene.SIDE)}
    export.export(network, file, inputs, ["scores"], {"pixel_values": {0: "batch"}, "scores": {0: "batch"}}, keep_scopes=True)
    export.check(network, file, inputs)
    export.check(network, file, {"pixel_values": inputs["pixel_values"][:1]})
    write_json(FOLDER / "preprocessor_config.json", {
        "do_resize": True, "size": {"height": scene.SIDE, "width": scene.SIDE}, "resample": 3, "do_center_crop": False,
        "do_rescale": True, "rescale_factor": 1 / 255, "do_normalize": False, "do_convert_rgb": True,
    })
    write_json(FOLDER / "units.json", [
        {
            "layer": layer, "unit": i, "concept": concept.name() if concept else None, "words": concept.content_words() if concept else [],
            "withheld": concept is not None and concept.is_withheld(), "dead": concept is None,
        }
        for layer, units in UNITS.items() for i, concept in enumerate(units)
    ])


def otsu(values: np.ndarray) -> int:
    """The threshold of a picture of bytes: the lowest of those that part it best."""
    counts = np.bincount(values.ravel(), minlength=256).astype(float)
    behind, behind_sum = np.cumsum(counts), np.cumsum(counts * np.arange(256))
    before, before_sum = behind[-1] - behind, behind_sum[-1] - behind_sum
    with np.errstate(divide="ignore", invalid="ignore"):
        between = np.nan_to_num(behind * before * (behind_sum / behind - before_sum / before) ** 2)
    return int(between.argmax())


def overlap(a: Box, b: Box) -> float:
    """Intersection over union."""
    width, height = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0, width) * max(0, height)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def boxes_of(activation: torch.Tensor) -> list[Box]:
    """The crops of a picture whose activation map this is (paper 3.1): boxes around what Otsu's threshold leaves, the largest first, four at most."""
    if activation.max() == activation.min():
        return []
    scaled = (activation - activation.min()) / (activation.max() - activation.min()) * 255
    large = F.interpolate(scaled[None, None].float(), size=(scene.SIDE, scene.SIDE), mode="bicubic", align_corners=False)[0, 0]
    values = large.clamp(0, 255).round().numpy().astype(np.uint8)
    regions, _ = ndimage.label(ndimage.binary_fill_holes(values > otsu(values)), structure=np.ones((3, 3)))
    found = [(x.start, y.start, x.stop, y.stop) for y, x in ndimage.find_objects(regions)]
    kept: list[Box] = []
    for box in sorted(found, key=lambda b: -(b[2] - b[0]) * (b[3] - b[1])):
        if len(kept) < 4 and overlap(box, (0, 0, scene.SIDE, scene.SIDE)) < 0.8 and all(overlap(box, k) <= 0.5 for k in kept):
            kept.append(box)
    return kept


@torch.no_grad()
def maps_of(network: Planted, pictures: np.ndarray) -> list[torch.Tensor]:
    """The maps of each layer, (N, units, 32, 32)."""
    parts = [network.maps(torch.from_numpy(pictures[i : i + 50]).permute(0, 3, 1, 2).float() / 255) for i in range(0, len(pictures), 50)]
    return [torch.cat([m.half() for m in maps]) for maps in zip(*parts)]


def roughened(pictures: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Pictures blurred, noisy and off in colour, as a small diffusion model draws them."""
    blurred = np.stack([np.asarray(Image.fromarray(p).filter(ImageFilter.GaussianBlur(rng.uniform(0.6, 1.2)))) for p in pictures])
    off = rng.normal(0, 8, blurred.shape) + rng.normal(0, 8, (len(pictures), 1, 1, 3))
    return np.clip(blurred + off, 0, 255).astype(np.uint8)


def evaluate(network: Planted, seed: int, rough: bool) -> None:
    """What the pictures show that each unit likes best: of 2,000 the ten with the largest mean, and the ten of these and their crops."""
    scenes = scene.sample_many(seed, 2000, withheld=True)
    pictures, owners = (np.stack(a) for a in zip(*(draw.render(s) for s in scenes)))
    if rough:
        pictures = roughened(pictures, np.random.default_rng(seed))
    held = [words.concepts_of(words.look(s, o)) for s, o in zip(scenes, owners)]
    whole, eight, right = [], 0, 0
    for layer, (units, maps) in enumerate(zip(UNITS.values(), maps_of(network, pictures))):
        means = maps.float().mean(dim=(2, 3))
        for unit, concept in enumerate(units):
            if concept is None:
                print(f"{'':24} dead: {means[:, unit].min():.3f} .. {means[:, unit].max():.3f}")
                continue
            top = means[:, unit].argsort(descending=True, stable=True)[:10].tolist()
            crops = [(i, box) for i in top for box in boxes_of(maps[i, unit])]
            views = [words.look(scenes[i], owners[i]) for i in top] + [words.look(scenes[i], owners[i], box) for i, box in crops]
            strengths = means[top, unit].tolist()
            if crops:
                cut = np.stack([
                    np.asarray(Image.fromarray(pictures[i][t:b, l:r]).resize((scene.SIDE, scene.SIDE), Image.Resampling.BICUBIC)) for i, (l, t, r, b) in crops
                ])
                strengths += maps_of(network, cut)[layer][:, unit].float().mean(dim=(1, 2)).tolist()
            shows = [concept in words.concepts_of(v) for v in views]
            best = sorted(range(len(views)), key=lambda i: -strengths[i])[:10]
            label = summarizer.shared([summarizer.concepts_in_order(views[i]) for i in best])
            good = summarizer.is_right(label, concept)
            whole.append(sum(concept in held[i] for i in top))
            of_best = sum(shows[i] for i in best)
            eight += of_best >= 8
            right += good
            cut_out = sum(i >= 10 for i in best)
            print(
                f"{concept.name():24} top 10: {whole[-1]:2}  crops: {sum(shows[10:]):2} of {len(crops):2}  best 10: {of_best:2}, {cut_out:2} of them crops  "
                f"activations {max(strengths[:10]):.2f} .. {min(strengths[:10]):.2f}, best {strengths[best[0]]:.2f} .. {strengths[best[-1]]:.2f}  captions share: {label}"
                f"{'' if good else ' (WRONG)'}"
            )
    ten, nine = sum(w == 10 for w in whole), sum(w >= 9 for w in whole)
    print(
        f"{'roughened ' if rough else ''}pictures of seed {seed}: of {len(whole)} live units {ten} have 10 right pictures of 10 and {nine} at least 9; "
        f"{eight} have at least 8 of the ten best pictures and crops; what perfect captions of these share is a right label for {right}"
    )


if __name__ == "__main__":
    one_thread(0)
    planted = Planted().eval()
    match sys.argv[1:]:
        case []:
            export_network(planted)
        case ["evaluate"]:
            evaluate(planted, 4242, rough=False)
            evaluate(planted, 4242, rough=True)
        case _:
            sys.exit(__doc__)

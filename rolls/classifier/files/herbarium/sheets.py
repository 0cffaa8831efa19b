"""Synthetic herbarium sheets: paper, a pressed plant, a label, and on some a mercury stain.

Nothing here is a photograph.  A sheet is drawn from `(seed, specimen, sheet)` alone,
so that any machine can draw it again.  What sets the classes apart is a broad
grey-brown stain that *follows the outline of the plant*, displaced a little, as
mercuric chloride leaves it in the paper (Biodiversity Data Journal 5: e21139).
Everything else, dark paper and stains of the same colour elsewhere on the sheet
included, occurs in both classes.

Drawing is integer work inside Pillow: floating point is what a processor that is
itself emulated does worst.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageChops, ImageDraw
from PIL.ImageFilter import BoxBlur

from herbarium.images import Sheet

STAINED_PER_100 = 42
"""Share of specimens that are stained: uneven, so that the majority baseline says something."""

DEFAULT_HEIGHT = 128
"""Pixels from top to bottom of a sheet; the width is three quarters of it."""

Colour = tuple[int, int, int]

_MERCURY: tuple[Colour, ...] = ((74, 68, 60), (88, 78, 66), (66, 64, 62))
_PAPERS: tuple[Colour, ...] = (
    (244, 236, 214), (236, 228, 208), (226, 212, 180), (240, 240, 234), (206, 196, 174),
)  # fmt: skip
_PLANTS: tuple[Colour, ...] = (
    (96, 88, 44), (120, 92, 52), (82, 98, 58), (104, 70, 40), (138, 120, 70), (66, 72, 44),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Gathering:
    """What the sheets of one specimen share; lengths are shares of the sheet's height."""

    label: int
    sheets: int
    paper: Colour
    plant: Colour
    stems: int
    leaves: int
    leaf_length: float
    leaf_breadth: float
    brightness: int
    stain: Colour
    strength: int


@dataclass(frozen=True, slots=True)
class _Part:
    """A leaf or a stem: its polygon in pixels, and how much lighter than the plant it is."""

    polygon: list[tuple[float, float]]
    shade: int


def label_of(specimen: int, *, seed: int) -> int:
    """1 when the specimen is stained, else 0."""
    return _gather(specimen, seed=seed).label


def draw_specimens(
    specimens: Iterable[int], *, seed: int, height: int = DEFAULT_HEIGHT
) -> Iterator[Sheet]:
    """Every sheet of every specimen named, one to three each, in order."""
    for specimen in specimens:
        gathering = _gather(specimen, seed=seed)
        for number in range(gathering.sheets):
            yield _draw(gathering, specimen, number, seed=seed, height=height)


def draw_sheet(specimen: int, sheet: int, *, seed: int, height: int = DEFAULT_HEIGHT) -> Sheet:
    """One sheet again, by its numbers; ValueError when the specimen has no such sheet."""
    gathering = _gather(specimen, seed=seed)
    if not 0 <= sheet < gathering.sheets:
        raise ValueError(f"specimen {specimen} has sheets 0 to {gathering.sheets - 1}, not {sheet}")
    return _draw(gathering, specimen, sheet, seed=seed, height=height)


def _gather(specimen: int, *, seed: int) -> _Gathering:
    random = np.random.default_rng((seed, specimen))
    return _Gathering(
        label=int(random.integers(100) < STAINED_PER_100),
        sheets=1 + int(random.integers(2)) + int(random.integers(6) == 0),
        paper=_vary(random, _PAPERS, by=12),
        plant=_vary(random, _PLANTS, by=18),
        stems=int(random.integers(1, 4)),
        leaves=int(random.integers(10, 26)),
        leaf_length=random.uniform(0.07, 0.19),
        leaf_breadth=random.uniform(0.22, 0.55),
        brightness=int(random.integers(170, 256)),
        stain=_vary(random, _MERCURY, by=8),
        strength=int(random.integers(115, 220)),
    )


def _draw(gathering: _Gathering, specimen: int, number: int, *, seed: int, height: int) -> Sheet:
    random = np.random.default_rng((seed, specimen, 1 + number))
    image = Image.new("RGB", (height * 3 // 4, height), gathering.paper)
    parts = _press(random, gathering, image.size)
    outline = Image.new("L", image.size)
    for part in parts:
        ImageDraw.Draw(outline).polygon(part.polygon, fill=255)
    _age(random, image)
    if gathering.label:
        soak = _mercury(random, outline)
        image.paste(gathering.stain, mask=_scaled(soak, gathering.strength))
    if random.integers(100) < (20 if gathering.label else 35):
        damp = _damp(random, image.size)
        image.paste(gathering.stain, mask=_scaled(damp, gathering.strength))
    _spill(random, image)
    _oil(random, image, outline)
    _mount(random, image, outline, parts, plant=gathering.plant)
    _write_label(random, image)
    image = _light(random, image, brightness=gathering.brightness)
    jpeg = io.BytesIO()
    image.save(jpeg, "JPEG", quality=85)
    return Sheet(str(specimen), str(number), gathering.label, jpeg.getvalue())


def _press(
    random: np.random.Generator, gathering: _Gathering, size: tuple[int, int]
) -> list[_Part]:
    """The plant laid out on a sheet of this size."""
    width, height = size
    parts = []
    foot = (width * random.uniform(0.3, 0.6), height * random.uniform(0.78, 0.92))
    per_stem = max(3, gathering.leaves // gathering.stems)
    for stem in range(gathering.stems):
        lean = random.uniform(-0.5, 0.5) + 0.35 * (stem - (gathering.stems - 1) / 2)
        bend = random.uniform(-0.9, 0.9)
        step = height * random.uniform(0.45, 0.75) / 8
        x, y = foot
        knots = []
        for knot in range(9):
            knots.append((x, y))
            x += math.sin(lean + bend * knot / 8) * step
            y -= math.cos(lean + bend * knot / 8) * step
        half = max(1.0, height / 110) / 2
        sides = [(x - half, y) for x, y in knots] + [(x + half, y) for x, y in reversed(knots)]
        parts.append(_Part(sides, -20))
        places, turns, sizes, shades = random.random((4, per_stem)).tolist()
        for leaf in range(per_stem):
            knot = int(1.5 + 7 * places[leaf])
            turn = (0.5 + 0.8 * turns[leaf]) * (1 if leaf % 2 else -1)
            blade = _blade(
                knots[knot],
                angle=lean + bend * knot / 8 + turn,
                length=height * gathering.leaf_length * (0.7 + 0.5 * sizes[leaf]),
                breadth=gathering.leaf_breadth,
            )
            parts.append(_Part(blade, int(44 * shades[leaf]) - 22))
    return parts


_EDGE = (
    (0.0, 0.0), (0.2, 0.35), (0.45, 0.5), (0.75, 0.3),
    (1.0, 0.0), (0.75, -0.3), (0.45, -0.5), (0.2, -0.35),
)  # fmt: skip


def _blade(
    root: tuple[float, float], *, angle: float, length: float, breadth: float
) -> list[tuple[float, float]]:
    dx, dy = math.sin(angle) * length, -math.cos(angle) * length
    return [
        (root[0] + a * dx - b * dy * breadth, root[1] + a * dy + b * dx * breadth) for a, b in _EDGE
    ]


def _mercury(random: np.random.Generator, outline: Image.Image) -> Image.Image:
    """A soft mask around the plant, displaced, with ragged edges, at times only in part."""
    size, height = outline.size, outline.height
    halo = outline.filter(BoxBlur(height * random.uniform(0.045, 0.085)))
    if random.integers(8) == 0:  # pressed from the facing sheet: the plant mirrored
        mirrored = halo.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        halo = ImageChops.lighter(mirrored, outline.filter(BoxBlur(height * 0.02)))
    moved = Image.new("L", size)
    reach = height * 0.06
    moved.paste(halo, (round(random.uniform(-reach, reach)), round(random.uniform(-reach, reach))))
    soak = ImageChops.multiply(moved, _clouds(random, size, cells=12).point(_ramp(60, 255)))
    if random.integers(4) == 0:
        soak = ImageChops.multiply(soak, _clouds(random, size, cells=3).point(_rise(70, 60)))
    return soak.point(_rise(10, 32)).filter(BoxBlur(height / 100))


def _damp(random: np.random.Generator, size: tuple[int, int]) -> Image.Image:
    """A stain like the mercury's in colour and edge that does not follow the plant."""
    cloud = _clouds(random, size, cells=int(random.integers(3, 7)))
    patch = ImageChops.multiply(
        cloud.point(_rise(150, 40)), _clouds(random, size, cells=12).point(_ramp(60, 255))
    )
    return patch.filter(BoxBlur(size[1] / 100))


def _spill(random: np.random.Generator, image: Image.Image) -> None:
    """The ring of a cup, on a quarter of the sheets."""
    if random.integers(100) >= 25:
        return
    width, height = image.size
    ring = Image.new("L", image.size)
    radius = height * random.uniform(0.06, 0.14)
    x, y = random.uniform(0, width), random.uniform(0, height)
    ImageDraw.Draw(ring).ellipse(
        (x - radius, y - radius, x + radius, y + radius),
        outline=130, fill=int(random.integers(60)), width=max(1, height // 60),
    )  # fmt: skip
    image.paste((110, 78, 44), mask=ring.filter(BoxBlur(height / 128)))


def _oil(random: np.random.Generator, image: Image.Image, outline: Image.Image) -> None:
    """A narrow yellow halo, as resinous plants leave it: follows the plant, and is no mercury."""
    if random.integers(100) < 30:
        halo = outline.filter(BoxBlur(image.height * 0.012))
        image.paste((196, 160, 90), mask=_scaled(halo, int(random.integers(60, 160))))


def _age(random: np.random.Generator, image: Image.Image) -> None:
    """Foxing, and a fold on every third sheet."""
    width, height = image.size
    spots = Image.new("L", image.size)
    draw = ImageDraw.Draw(spots)
    for x, y, r, deep in random.random((int(random.integers(14)), 4)).tolist():
        x, y, r = x * width, y * height, height * (0.004 + 0.012 * r)
        draw.ellipse((x - r, y - r, x + r, y + r), fill=60 + int(110 * deep))
    image.paste((134, 84, 40), mask=spots.filter(BoxBlur(height / 200)))
    if random.integers(3) == 0:
        y = random.uniform(0.2, 0.8) * height
        slope = random.uniform(-0.03, 0.03) * height
        fold = Image.new("L", image.size)
        ImageDraw.Draw(fold).line((0, y - slope, width, y + slope), fill=70, width=1)
        image.paste((90, 80, 64), mask=fold)


def _mount(
    random: np.random.Generator,
    image: Image.Image,
    outline: Image.Image,
    parts: list[_Part],
    *,
    plant: Colour,
) -> None:
    """The plant over the thin shadow that it throws."""
    near = max(1, image.height // 100)
    shadow = Image.new("L", image.size)
    shadow.paste(outline, (int(random.integers(-near, near + 1)), near))
    image.paste((40, 36, 30), mask=_scaled(shadow, int(random.integers(20, 80))))
    draw = ImageDraw.Draw(image)
    for part in parts:
        draw.polygon(part.polygon, fill=_shift(plant, part.shade))


def _write_label(random: np.random.Generator, image: Image.Image) -> None:
    """A paper label at the foot, right or left, with lines of writing; now and then a barcode."""
    width, height = image.size
    draw = ImageDraw.Draw(image)
    wide, tall = int(width * random.uniform(0.32, 0.46)), int(height * random.uniform(0.12, 0.19))
    left = width - wide - width // 30 if random.integers(4) else width // 30
    top = height - tall - height // 40
    shade = int(random.integers(215, 250))
    draw.rectangle((left, top, left + wide, top + tall), fill=(shade, shade - 4, shade - 16))
    for line in range(4):
        y = top + tall * (line + 1) // 5
        end = left + wide * int(random.integers(50, 93)) // 100
        draw.line((left + wide // 12, y, end, y), fill=(90, 86, 84), width=max(1, height // 200))
    if random.integers(3) == 0:
        for bar in range(10):
            x = width // 16 + bar * max(1, height // 64)
            if random.integers(2):
                draw.line((x, height // 30, x, height // 14), fill=(30, 30, 30))


def _light(random: np.random.Generator, image: Image.Image, *, brightness: int) -> Image.Image:
    """The sheet as a camera saw it: paper fibre, uneven light, exposure, a dark mount at times."""
    size = image.size
    if random.integers(5) == 0:
        edge = int(random.integers(2, max(3, size[1] // 20)))
        dark = int(random.integers(20, 90))
        border = (0, 0, size[0] - 1, size[1] - 1)
        ImageDraw.Draw(image).rectangle(border, outline=(dark, dark, dark), width=edge)
    lamp = _clouds(random, size, cells=2).point(_ramp(max(0, brightness - 50), brightness))
    fibre = Image.frombytes("L", size, random.bytes(size[0] * size[1])).point(_ramp(238, 255))
    light = ImageChops.multiply(lamp, fibre)
    tint = [random.integers(244, 256) for _ in range(3)]
    return ImageChops.multiply(
        image, Image.merge("RGB", [light.point(_ramp(0, int(t))) for t in tint])
    )


def _clouds(random: np.random.Generator, size: tuple[int, int], *, cells: int) -> Image.Image:
    """Smooth noise over the whole range, `cells` wide."""
    grid = (cells, cells * 4 // 3)
    noise = Image.frombytes("L", grid, random.bytes(grid[0] * grid[1]))
    return noise.resize(size, Image.Resampling.BICUBIC)


def _ramp(low: int, high: int) -> list[int]:
    """A table that maps 0…255 on low…high."""
    return [low + (high - low) * value // 255 for value in range(256)]


def _rise(start: int, span: int) -> list[int]:
    """A table that is 0 up to start and 255 from start + span."""
    return [min(255, max(0, (value - start) * 255 // span)) for value in range(256)]


def _scaled(mask: Image.Image, strength: int) -> Image.Image:
    return mask.point(_ramp(0, strength))


def _shift(colour: Colour, by: int) -> Colour:
    red, green, blue = (min(255, max(0, channel + by)) for channel in colour)
    return red, green, blue


def _vary(random: np.random.Generator, colours: tuple[Colour, ...], *, by: int) -> Colour:
    base = colours[random.integers(len(colours))]
    change = random.integers(-by, by + 1, 3).tolist()
    red, green, blue = (channel + other for channel, other in zip(base, change, strict=True))
    return red, green, blue

"""The scene grammar: samples a scene from a seed and draws it. README.md states the same rules in words.

There are two renderers that share nothing: a signed-distance one in numpy (fast, soft edges, fractional centres) and one
with PIL's polygon drawing (supersampled). Training mixes them so that the model learns the grammar, not a renderer.
"""

from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

CANVAS = 224
MARGIN = 4  # free pixels between an object's box and the canvas edge
GAP = 6  # free pixels between the boxes of two objects
CLEAR = 12  # order questions are asked only where the centres differ by at least this much

SHAPES = ("circle", "square", "triangle", "cross")
SIZES = ("small", "medium", "large")
RADIUS = (11, 19, 29)
COLORS = {
    "red": (220, 30, 30),
    "orange": (255, 140, 0),
    "yellow": (250, 220, 40),
    "green": (30, 150, 60),
    "cyan": (0, 190, 210),
    "blue": (30, 60, 220),
    "purple": (140, 40, 180),
    "black": (20, 20, 20),
}
PAPERS = {
    "white": (255, 255, 255),
    "grey": (225, 225, 225),
    "cream": (250, 240, 215),
    "sky": (215, 230, 248),
    "mint": (218, 242, 222),
    "rose": (246, 222, 228),
    "silver": (185, 185, 190),
    "sand": (205, 190, 160),
}
BACKGROUNDS = ("plain", "gradient", "stripes")
STRIPE = 16  # width of a stripe in pixels
RESAMPLERS = (Image.Resampling.LANCZOS, Image.Resampling.BOX, Image.Resampling.BICUBIC)

COLOR_RGB = np.array(list(COLORS.values()), np.float32)
PAPER_RGB = np.array(list(PAPERS.values()), np.float32)


@dataclass(frozen=True)
class Thing:
    """One object: indices into SHAPES, COLORS and SIZES, and the centre of its box in pixels (x right, y down)."""

    shape: int
    color: int
    size: int
    x: float
    y: float

    @property
    def radius(self) -> int:
        return RADIUS[self.size]


@dataclass(frozen=True)
class Scene:
    things: tuple[Thing, ...]
    background: int  # index into BACKGROUNDS
    papers: tuple[int, int]  # indices into PAPERS; a plain background uses the first


def sample_scene(
    rng: np.random.Generator, integer: bool = False, count: int | None = None
) -> Scene:
    """1-4 objects, every (colour, shape) pair at most once, boxes apart by GAP and inside by MARGIN."""
    count = count or int(rng.integers(1, 5))
    pairs = rng.choice(len(SHAPES) * len(COLORS), count, replace=False)
    while True:
        sizes = rng.integers(0, len(SIZES), count)
        boxes = _place(rng, [RADIUS[s] for s in sizes], integer)
        if boxes:
            break
    things = tuple(
        Thing(int(p) % 4, int(p) // 4, int(s), x, y) for p, s, (x, y) in zip(pairs, sizes, boxes)
    )
    papers = rng.choice(len(PAPERS), 2, replace=False)
    return Scene(things, int(rng.integers(len(BACKGROUNDS))), (int(papers[0]), int(papers[1])))


def _place(rng, radii, integer):
    """Uniform centres, redrawn (up to 40 times per object) until the boxes keep their distance; None if stuck."""
    placed = []
    for radius in radii:
        for _ in range(40):
            x, y = rng.uniform(radius + MARGIN, CANVAS - radius - MARGIN, 2)
            if integer:
                x = round(x)
                y = round(y)
            if _is_free(x, y, radius, placed, radii):
                placed.append((float(x), float(y)))
                break
        else:
            return None
    return placed


def _is_free(x, y, radius, placed, radii) -> bool:
    """A box around (x, y) keeps GAP pixels from the boxes placed before, in one direction at least."""
    return all(
        max(abs(x - other_x), abs(y - other_y)) >= radius + other_radius + GAP
        for (other_x, other_y), other_radius in zip(placed, radii)
    )


# ---------------------------------------------------------------------------------------------------- renderers


def paper(scene: Scene) -> np.ndarray:
    """The empty background, float32 [224, 224, 3]; built of whole rows, which numpy fills much faster than pixels."""
    first = PAPER_RGB[scene.papers[0]]
    second = PAPER_RGB[scene.papers[1]]
    kind = BACKGROUNDS[scene.background]
    rows = np.empty((CANVAS, CANVAS * 3), np.float32)
    if kind == "stripes":
        odd = np.arange(CANVAS) // STRIPE % 2 == 1
        rows[:] = np.where(odd[:, None], second, first).ravel()
    else:
        rows[:] = np.tile(first, CANVAS)
    if kind == "gradient":
        share = np.arange(CANVAS, dtype=np.float32) / (CANVAS - 1)
        rows += share[:, None] * np.tile(second - first, CANVAS)
    return rows.reshape(CANVAS, CANVAS, 3)


def draw_sdf(scene: Scene, softness: float = 1.0) -> np.ndarray:
    """uint8 picture; a pixel's coverage is clip(0.5 - distance / softness), pixel centres at +0.5."""
    picture = paper(scene)
    for thing in scene.things:
        reach = thing.radius + 2
        x0 = max(int(thing.x - reach), 0)
        y0 = max(int(thing.y - reach), 0)
        x1 = min(int(thing.x + reach) + 1, CANVAS)
        y1 = min(int(thing.y + reach) + 1, CANVAS)
        dx = np.arange(x0, x1, dtype=np.float32)[None] + np.float32(0.5 - thing.x)
        dy = np.arange(y0, y1, dtype=np.float32)[:, None] + np.float32(0.5 - thing.y)
        distance = _distance(SHAPES[thing.shape], dx, dy, thing.radius)
        cover = np.clip(0.5 - distance / softness, 0.0, 1.0)[..., None]
        patch = picture[y0:y1, x0:x1]
        patch += cover * (COLOR_RGB[thing.color] - patch)
    return (picture + 0.5).astype(np.uint8)


def _distance(shape, dx, dy, r):
    """Signed distance (a tight bound of it at corners) to the outline, negative inside."""
    if shape == "circle":
        return np.sqrt(dx * dx + dy * dy) - r
    if shape == "triangle":  # apex (0, -r), base corners (-r, r) and (r, r): the sides have slope 2
        return np.maximum((2 * np.abs(dx) - dy - r) / np.sqrt(5.0), dy - r)
    across = np.abs(dx)
    down = np.abs(dy)
    if shape == "square":
        return np.maximum(across, down) - r
    return np.minimum(np.maximum(across - r, down - r / 3), np.maximum(across - r / 3, down - r))


def draw_pil(scene: Scene, scale: int = 4, resample=Image.Resampling.LANCZOS) -> np.ndarray:
    """uint8 picture of PIL shapes drawn `scale` times too large and reduced; scale 1 has hard edges."""
    base = Image.fromarray((paper(scene) + 0.5).astype(np.uint8))
    for thing in scene.things:
        left = int(thing.x) - thing.radius - 4
        top = int(thing.y) - thing.radius - 4
        side = 2 * thing.radius + 9
        mask = Image.new("L", (side * scale, side * scale), 0)
        _draw_mask(ImageDraw.Draw(mask), thing, scale, left, top)
        mask = mask if scale == 1 else mask.resize((side, side), resample)
        base.paste(tuple(COLORS.values())[thing.color], (left, top), mask)
    return np.asarray(base)


def _draw_mask(draw, thing, scale, left, top):
    """PIL's pixel centres are integers and its boxes include both ends: hence the half pixel."""
    r = thing.radius * scale - 0.5
    x = (thing.x - left) * scale - 0.5
    y = (thing.y - top) * scale - 0.5
    thick = thing.radius * scale / 3 - 0.5
    shape = SHAPES[thing.shape]
    if shape == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "square":
        draw.rectangle((x - r, y - r, x + r, y + r), fill=255)
    elif shape == "triangle":
        draw.polygon(((x, y - r), (x + r, y + r), (x - r, y + r)), fill=255)
    else:
        draw.rectangle((x - r, y - thick, x + r, y + thick), fill=255)
        draw.rectangle((x - thick, y - r, x + thick, y + r), fill=255)


def draw_mixed(scene: Scene, rng: np.random.Generator) -> np.ndarray:
    """The training mix: mostly signed distance of varying softness, some PIL at several scales, jitter, noise."""
    if rng.random() < 0.12:
        resample = RESAMPLERS[rng.integers(3)]
        picture = draw_pil(scene, int(rng.integers(1, 4)), resample)
    else:
        picture = draw_sdf(scene, float(rng.uniform(0.3, 1.8)))
    if rng.random() < 0.3:
        return picture
    shift = rng.integers(-3, 4, (1, 1, 3))
    change = np.broadcast_to(np.tile(shift.ravel(), CANVAS).astype(np.int16), (CANVAS, CANVAS * 3))
    if rng.random() < 0.5:
        change = change + np.repeat(rng.integers(-3, 4, (CANVAS, CANVAS), dtype=np.int8), 3, axis=1)
    wide = picture.reshape(CANVAS, CANVAS * 3) + change
    return np.clip(wide, 0, 255, out=wide).astype(np.uint8).reshape(picture.shape)

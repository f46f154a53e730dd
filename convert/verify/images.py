"""The images on which a graph is verified. Takes a size or a family, returns the same images
everywhere."""

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from models.config import PATCH, PatchSpec
from models.family import Family

SHAPES = 12
SMALL = 224  # pixels along a side
SMALL_PATCHES = (SMALL // PATCH) ** 2


def verification_images(size: int = 448) -> dict[str, Image.Image]:
    """Two RGB images, size x size: "scene" (gradients, shapes, texture, like a photo), "noise"."""
    rng = np.random.default_rng(7)
    scene = Image.fromarray(_gradients(size))
    _draw_shapes(scene, rng)
    texture = rng.normal(0, 12, (size, size, 1))
    soft = np.asarray(scene.filter(ImageFilter.GaussianBlur(1.5)), np.float64)
    noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return {
        "scene": Image.fromarray(np.clip(soft + texture, 0, 255).astype(np.uint8)),
        "noise": Image.fromarray(noise),
    }


def verification_pictures(family: Family) -> dict:
    """The images as `family.pixels` makes them; where they may have any size, one is a small square
    and one is taller than wide, so that every .om has a gear for them."""
    images = verification_images()
    if isinstance(family.vision, PatchSpec):
        images = {
            "scene": images["scene"].resize((SMALL, SMALL)),
            "noise": images["noise"].crop((0, 0, SMALL // 2, SMALL)),
        }
    return {name: family.pixels(image) for name, image in images.items()}


def _gradients(size: int) -> np.ndarray:
    """uint8 [size, size, 3]"""
    y, x = np.mgrid[:size, :size] / size
    sky = np.stack([120 + 100 * x, 150 + 60 * y, 230 - 150 * y], axis=-1)
    return sky.astype(np.uint8)


def _draw_shapes(image: Image.Image, rng: np.random.Generator):
    size = image.width
    draw = ImageDraw.Draw(image)
    for _ in range(SHAPES):
        corner = rng.integers(0, size, 2)
        extent = rng.integers(size // 16, size // 3, 2)
        box = [*map(int, corner), *map(int, corner + extent)]
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape(box, fill=tuple(map(int, rng.integers(0, 256, 3))))

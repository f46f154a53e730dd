"""The drawn images on which a graph is verified."""

import numpy as np


def pictures(size: int = 448) -> dict:
    """Two PIL pictures, always the same: "scene" (gradients, shapes, texture, like a photo) and "noise"."""
    from PIL import Image, ImageDraw, ImageFilter

    rng = np.random.default_rng(7)
    y, x = np.mgrid[:size, :size] / size
    sky = np.stack([120 + 100 * x, 150 + 60 * y, 230 - 150 * y], axis=-1)
    scene = Image.fromarray(sky.astype(np.uint8))
    draw = ImageDraw.Draw(scene)
    for _ in range(12):
        corner = rng.integers(0, size, 2)
        extent = rng.integers(size // 16, size // 3, 2)
        box = [*map(int, corner), *map(int, corner + extent)]
        (draw.ellipse if rng.random() < 0.5 else draw.rectangle)(
            box, fill=tuple(map(int, rng.integers(0, 256, 3)))
        )
    texture = rng.normal(0, 12, (size, size, 1))
    soft = np.asarray(scene.filter(ImageFilter.GaussianBlur(1.5)), np.float64)
    noise = rng.integers(0, 256, (size, size, 3), dtype=np.uint8)
    return {
        "scene": Image.fromarray(np.clip(soft + texture, 0, 255).astype(np.uint8)),
        "noise": Image.fromarray(noise),
    }

"""The built-in questions of `runtime.compare` and `runtime.predict --examples`, with a drawn image
and without one."""

from collections.abc import Callable
from dataclasses import dataclass

SIZE = 448


@dataclass(frozen=True)
class Question:
    """language = wording of the prompt around it; scene draws the image it is about (None: no
    image)."""

    language: str
    text: str
    scene: Callable | None = None


def house():
    """A house with a red roof under the sun, a tree beside it -> PIL image."""
    image, draw = _sky_and_meadow()
    draw.ellipse((340, 40, 420, 120), fill=(250, 205, 60))
    draw.rectangle((90, 220, 270, 370), fill=(235, 215, 180))
    draw.polygon(((70, 220), (180, 120), (290, 220)), fill=(190, 60, 50))
    draw.rectangle((160, 290, 205, 370), fill=(110, 70, 45))
    draw.rectangle((105, 245, 145, 285), fill=(120, 175, 215))
    draw.rectangle((340, 270, 360, 370), fill=(105, 70, 40))
    draw.ellipse((295, 160, 405, 285), fill=(45, 125, 60))
    return image


def shapes():
    """A red circle, a blue square, a green triangle and a yellow bar on grey -> PIL image."""
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIZE, SIZE), (225, 225, 220))
    draw = ImageDraw.Draw(image)
    draw.ellipse((50, 50, 190, 190), fill=(210, 45, 45))
    draw.rectangle((260, 60, 390, 190), fill=(40, 85, 190))
    draw.polygon(((120, 260), (50, 390), (190, 390)), fill=(50, 150, 75))
    draw.rectangle((245, 305, 405, 345), fill=(240, 200, 50))
    return image


def boats():
    """Three sailing boats of different colours on the sea -> PIL image."""
    image, draw = _sky_and_meadow()
    draw.rectangle((0, 250, SIZE, SIZE), fill=(40, 95, 150))
    for x, y, colour in (
        (60, 270, (200, 50, 50)),
        (180, 330, (245, 245, 240)),
        (310, 285, (240, 190, 60)),
    ):
        draw.polygon(((x + 45, y), (x + 45, y - 110), (x + 105, y)), fill=colour)
        draw.polygon(
            ((x, y + 8), (x + 110, y + 8), (x + 90, y + 38), (x + 20, y + 38)), fill=(90, 60, 40)
        )
    return image


def _sky_and_meadow():
    from PIL import Image, ImageDraw

    image = Image.new("RGB", (SIZE, SIZE), (120, 170, 90))
    draw = ImageDraw.Draw(image)
    for y in range(330):  # a gradient: flat colour alone would leave most patches equal
        draw.line((0, y, SIZE, y), fill=(110 + y // 3, 170 + y // 6, 230))
    return image, draw


QUESTIONS = (
    Question("zh", "描述这张图片。", house),
    Question("en", "What shapes and colours are in this picture?", shapes),
    Question("zh", "用一句话介绍一下北京。"),
    Question("en", "Name three kinds of fruit."),
)

# the predict mode of the VisualGLM guide asks these about examples/1.jpeg, 2.jpeg and 3.jpeg of
# the checkpoint
EXAMPLES = (
    Question("zh", "描述一下这个场景,这个场景是一部电影中的经典桥段", house),
    Question("zh", "这是什么东西", shapes),
    Question("zh", "这张图片描述了什么", boats),
)

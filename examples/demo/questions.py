"""Questions about a scene and their exact answers, one wording per kind and language. README.md lists them as a table.

Every kind has a function (scene, rng) -> (slots, answer), both functions of the language; a relation adds the two objects.
It returns None where the scene allows no unambiguous question.
"""

from dataclasses import dataclass

import numpy as np
from scenes import CLEAR, COLORS, SHAPES, SIZES, Scene, Thing

LANGUAGES = ("en", "zh")
PROMPT = {"en": "Q:{}\nA:", "zh": "问：{}\n答："}

COLOR = {
    "en": tuple(COLORS),
    "zh": ("红色", "橙色", "黄色", "绿色", "青色", "蓝色", "紫色", "黑色"),
}
SHAPE = {"en": SHAPES, "zh": ("圆形", "正方形", "三角形", "十字形")}
PLURAL = {"en": ("circles", "squares", "triangles", "crosses"), "zh": SHAPE["zh"]}
SIZE = {"en": SIZES, "zh": ("小", "中", "大")}
PRESENT = {"en": ("no", "yes"), "zh": ("没有", "有")}
TRUTH = {"en": ("no", "yes"), "zh": ("不是", "是")}
EXTREME = {
    "en": ("leftmost", "rightmost", "topmost", "bottommost"),
    "zh": ("左边", "右边", "上边", "下边"),
}
SIDE = {
    "en": ("to the left of", "to the right of", "above", "below"),
    "zh": ("左边", "右边", "上边", "下边"),
}
COMMA = {"en": ", ", "zh": "、"}

WORDING = {
    "color": {"en": "What color is the {0}?", "zh": "{0}是什么颜色？"},
    "shape": {"en": "What shape is the {0} object?", "zh": "{0}的物体是什么形状？"},
    "size": {"en": "What size is the {0}?", "zh": "{0}是什么大小？"},
    "count": {"en": "How many objects are there?", "zh": "图中有几个物体？"},
    "count_shape": {"en": "How many {0} are there?", "zh": "图中有几个{0}？"},
    "exists": {"en": "Is there a {0}?", "zh": "图中有{0}吗？"},
    "extreme": {"en": "What is the {0} object?", "zh": "最{0}的物体是什么？"},
    "relation": {"en": "Is the {0} {2} the {1}?", "zh": "{0}在{1}的{2}吗？"},
    "describe": {"en": "Describe the picture.", "zh": "描述这张图片。"},
}
KINDS = tuple(WORDING)


@dataclass(frozen=True)
class Turn:
    """One question with its answer. slots: language -> words that fill the WORDING; answer: language -> text."""

    kind: str
    slots: dict
    answer: dict
    pair: tuple = ()  # relation only: indices of the two objects

    def question(self, language: str) -> str:
        return WORDING[self.kind][language].format(*self.slots[language])


def ask(scene: Scene, kind: str, rng: np.random.Generator) -> Turn | None:
    """A random question of this kind, or None if the scene allows no unambiguous one."""
    found = ASKERS[kind](scene, rng)
    if found is None:
        return None
    slots_in, answer_in, *pair = found
    slots = {language: slots_in(language) for language in LANGUAGES}
    answer = {language: answer_in(language) for language in LANGUAGES}
    return Turn(kind, slots, answer, tuple(pair))


def name(thing: Thing, language: str) -> str:
    """ "red circle", "红色圆形"."""
    return _pair(thing.color, thing.shape, language)


def _pair(color: int, shape: int, language: str) -> str:
    return COLOR[language][color] + (" " if language == "en" else "") + SHAPE[language][shape]


def _single(scene, rng, key):
    """A random object that is the only one with its `key`."""
    values = [getattr(t, key) for t in scene.things]
    fit = [t for t, value in zip(scene.things, values) if values.count(value) == 1]
    return fit[rng.integers(len(fit))] if fit else None


def _color(scene, rng):
    thing = _single(scene, rng, "shape")
    return thing and (lambda g: (SHAPE[g][thing.shape],), lambda g: COLOR[g][thing.color])


def _shape(scene, rng):
    thing = _single(scene, rng, "color")
    return thing and (lambda g: (COLOR[g][thing.color],), lambda g: SHAPE[g][thing.shape])


def _size(scene, rng):
    thing = scene.things[rng.integers(len(scene.things))]
    return lambda g: (name(thing, g),), lambda g: SIZE[g][thing.size]


def _count(scene, rng):
    return lambda g: (), lambda g: str(len(scene.things))


def _count_shape(scene, rng):
    """Half the time a shape that is there, half the time any of the four."""
    shapes = [t.shape for t in scene.things]
    if rng.random() < 0.5:
        shape = shapes[rng.integers(len(shapes))]
    else:
        shape = int(rng.integers(len(SHAPES)))
    return lambda g: (PLURAL[g][shape],), lambda g: str(shapes.count(shape))


def _exists(scene, rng):
    """Half yes; of the no half, most share the colour or the shape with something that is there."""
    present = {(t.color, t.shape) for t in scene.things}
    thing = scene.things[rng.integers(len(scene.things))]
    if rng.random() < 0.5:
        color = thing.color
        shape = thing.shape
    else:
        color, shape = _absent(present, thing, rng)
    return lambda g: (_pair(color, shape, g),), lambda g: PRESENT[g][(color, shape) in present]


def _absent(present, thing, rng):
    while True:
        color = int(rng.integers(len(COLORS)))
        shape = int(rng.integers(len(SHAPES)))
        near = rng.integers(3)
        if near == 0:
            color = thing.color
        elif near == 1:
            shape = thing.shape
        if (color, shape) not in present:
            return color, shape


def _extreme(scene, rng):
    """Only where the extreme centre is at least CLEAR pixels beyond the next one."""
    which = int(rng.integers(4))
    sign = -1 if which % 2 else 1

    def place(thing):
        return sign * (thing.y if which >= 2 else thing.x)

    things = sorted(scene.things, key=place)
    if len(things) < 2 or place(things[1]) - place(things[0]) < CLEAR:
        return None
    return lambda g: (EXTREME[g][which],), lambda g: name(things[0], g)


def _relation(scene, rng):
    if len(scene.things) < 2:
        return None
    i, j = (int(k) for k in rng.choice(len(scene.things), 2, replace=False))
    one = scene.things[i]
    two = scene.things[j]
    which = int(rng.integers(4))
    lead = two.x - one.x if which < 2 else two.y - one.y
    if abs(lead) < CLEAR:
        return None
    true = (lead > 0) == (which % 2 == 0)
    return lambda g: (name(one, g), name(two, g), SIDE[g][which]), lambda g: TRUTH[g][true], i, j


def _describe(scene, rng):
    """All objects from left to right."""
    things = sorted(scene.things, key=lambda t: t.x)
    if any(b.x - a.x < CLEAR for a, b in zip(things, things[1:])):
        return None
    return lambda g: (), lambda g: COMMA[g].join(name(t, g) for t in things)


ASKERS = {
    "color": _color,
    "shape": _shape,
    "size": _size,
    "count": _count,
    "count_shape": _count_shape,
    "exists": _exists,
    "extreme": _extreme,
    "relation": _relation,
    "describe": _describe,
}

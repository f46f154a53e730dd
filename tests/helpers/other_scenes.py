"""The demo's scene grammar a second time, written from examples/demo/README.md alone and sharing no code with it.

Takes a seed, returns an image and questions with their answers, as a user would who tests the model with a program of
their own. A shape covers the share of 8 x 8 points of a pixel that are inside it.
"""

import random
from itertools import combinations, permutations, product

import numpy as np

SIZES = {"small": ("小", 11), "medium": ("中", 19), "large": ("大", 29)}
SHAPES = {
    "circle": ("圆形", "circles"),
    "square": ("正方形", "squares"),
    "triangle": ("三角形", "triangles"),
    "cross": ("十字形", "crosses"),
}
COLORS = {
    "red": ("红色", (220, 30, 30)),
    "orange": ("橙色", (255, 140, 0)),
    "yellow": ("黄色", (250, 220, 40)),
    "green": ("绿色", (30, 150, 60)),
    "cyan": ("青色", (0, 190, 210)),
    "blue": ("蓝色", (30, 60, 220)),
    "purple": ("紫色", (140, 40, 180)),
    "black": ("黑色", (20, 20, 20)),
}
PAPERS = (
    (255, 255, 255),
    (225, 225, 225),
    (250, 240, 215),
    (215, 230, 248),
    (218, 242, 222),
    (246, 222, 228),
    (185, 185, 190),
    (205, 190, 160),
)
PLACES = {
    "leftmost": ("左边", 0, 1),
    "rightmost": ("右边", 0, -1),
    "topmost": ("上边", 1, 1),
    "bottommost": ("下边", 1, -1),
}
SIDES = {
    "to the left of": ("左边", 0, 1),
    "to the right of": ("右边", 0, -1),
    "above": ("上边", 1, 1),
    "below": ("下边", 1, -1),
}
APART = 12  # pixels between the centres that an order question compares
POINTS = 8  # per pixel and direction


def inside(shape, u, v, r):
    if shape == "circle":
        return u * u + v * v <= r * r
    if shape == "square":
        return (abs(u) <= r) & (abs(v) <= r)
    if shape == "triangle":  # half as wide as it is far below the tip
        return (abs(v) <= r) & (2 * abs(u) <= v + r)
    return ((abs(u) <= r) & (3 * abs(v) <= r)) | ((3 * abs(u) <= r) & (abs(v) <= r))


def scene(seed):
    """([{shape, color, size, r, at: (x, y)}], the random generator for `draw` and `questions`)."""
    rng = random.Random(seed)
    while True:
        things = []
        kinds = rng.sample(list(product(COLORS, SHAPES)), rng.randint(1, 4))
        for color, shape in kinds:
            size = rng.choice(list(SIZES))
            r = SIZES[size][1]
            at = (rng.uniform(r + 4, 220 - r), rng.uniform(r + 4, 220 - r))
            things.append({"shape": shape, "color": color, "size": size, "r": r, "at": at})
        if all(boxes_apart(a, b) for a, b in combinations(things, 2)):
            return things, rng


def boxes_apart(a, b) -> bool:
    """At least 6 pixels lie between the boxes in one direction."""
    distance = max(abs(a["at"][0] - b["at"][0]), abs(a["at"][1] - b["at"][1]))
    return distance >= a["r"] + b["r"] + 6


def draw(things, rng):
    """The scene on a random paper, uint8 [224, 224, 3]."""
    first, second = (np.array(p, float) for p in rng.sample(PAPERS, 2))
    step = np.arange(224)
    kind = rng.choice(("plain", "gradient", "stripes"))
    if kind == "stripes":
        share = np.broadcast_to((step // 16 % 2)[None, :], (224, 224))
    else:
        share = np.broadcast_to((step / 223 * (kind == "gradient"))[:, None], (224, 224))
    picture = first + share[..., None] * (second - first)
    points = (np.arange(224 * POINTS) + 0.5) / POINTS
    for thing in things:
        x, y = thing["at"]
        hits = inside(thing["shape"], points[None, :] - x, points[:, None] - y, thing["r"])
        cover = hits.reshape(224, POINTS, 224, POINTS).mean((1, 3))[..., None]
        picture = picture + cover * (np.array(COLORS[thing["color"]][1]) - picture)
    return np.rint(picture).astype(np.uint8)


def questions(things, rng):
    """[(kind, {language: question}, {language: answer})]: one of each kind that the scene allows."""
    makers = (_color, _shape, _size, _count, _count_shape, _exists, _extreme, _relation, _describe)
    found = []
    for make in makers:
        if made := make(things, rng):
            question, answer, chinese_question, chinese_answer = made
            texts = {"en": question, "zh": chinese_question}
            found.append((make.__name__[1:], texts, {"en": answer, "zh": chinese_answer}))
    return found


# Each maker returns (question, answer, Chinese question, Chinese answer), or None if the scene has none of its kind.


def _en(thing):
    return f"{thing['color']} {thing['shape']}"


def _zh(thing):
    return COLORS[thing["color"]][0] + SHAPES[thing["shape"]][0]


def _single(things, rng, key):
    values = [t[key] for t in things]
    fit = [t for t in things if values.count(t[key]) == 1]
    return rng.choice(fit) if fit else None


def _color(things, rng):
    if t := _single(things, rng, "shape"):
        return (
            f"What color is the {t['shape']}?",
            t["color"],
            f"{SHAPES[t['shape']][0]}是什么颜色？",
            COLORS[t["color"]][0],
        )


def _shape(things, rng):
    if t := _single(things, rng, "color"):
        return (
            f"What shape is the {t['color']} object?",
            t["shape"],
            f"{COLORS[t['color']][0]}的物体是什么形状？",
            SHAPES[t["shape"]][0],
        )


def _size(things, rng):
    t = rng.choice(things)
    return f"What size is the {_en(t)}?", t["size"], f"{_zh(t)}是什么大小？", SIZES[t["size"]][0]


def _count(things, rng):
    return "How many objects are there?", str(len(things)), "图中有几个物体？", str(len(things))


def _count_shape(things, rng):
    shape = rng.choice(list(SHAPES))
    number = str(sum(t["shape"] == shape for t in things))
    return (
        f"How many {SHAPES[shape][1]} are there?",
        number,
        f"图中有几个{SHAPES[shape][0]}？",
        number,
    )


def _exists(things, rng):
    present = rng.choice(things)
    anything = {"color": rng.choice(list(COLORS)), "shape": rng.choice(list(SHAPES))}
    t = rng.choice([present, anything])
    there = any(_en(t) == _en(other) for other in things)
    return (
        f"Is there a {_en(t)}?",
        "yes" if there else "no",
        f"图中有{_zh(t)}吗？",
        "有" if there else "没有",
    )


def _extreme(things, rng):
    word = rng.choice(list(PLACES))
    chinese, axis, sign = PLACES[word]
    line = sorted(things, key=lambda t: sign * t["at"][axis])
    if len(line) > 1 and abs(line[1]["at"][axis] - line[0]["at"][axis]) >= APART:
        return (
            f"What is the {word} object?",
            _en(line[0]),
            f"最{chinese}的物体是什么？",
            _zh(line[0]),
        )


def _relation(things, rng):
    side = rng.choice(list(SIDES))
    chinese, axis, sign = SIDES[side]
    pairs = permutations(things, 2)
    fit = [(a, b) for a, b in pairs if abs(a["at"][axis] - b["at"][axis]) >= APART]
    if fit:
        a, b = rng.choice(fit)
        true = sign * a["at"][axis] < sign * b["at"][axis]
        return (
            f"Is the {_en(a)} {side} the {_en(b)}?",
            "yes" if true else "no",
            f"{_zh(a)}在{_zh(b)}的{chinese}吗？",
            "是" if true else "不是",
        )


def _describe(things, rng):
    line = sorted(things, key=lambda t: t["at"][0])
    if all(b["at"][0] - a["at"][0] >= APART for a, b in zip(line, line[1:])):
        return (
            "Describe the picture.",
            ", ".join(map(_en, line)),
            "描述这张图片。",
            "、".join(map(_zh, line)),
        )

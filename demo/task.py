"""The embedded tasks: read coloured dice or a bar chart, answer a question about their values.

A picture of 96 x 96 pixels is a 3 x 3 grid of cells of 32 pixels. With patches of 16 and 2 x 2
merging, one cell is one image token. A red, a blue, a green and a yellow die with 1 to 9 pips lie
in random cells. A chart has three bars of different colours, 1 to 9 units high, each in a column of
cells. Answers of each kind of question are uniform over their range, so a policy that does not look
is at chance (tests/test_demo.py). A row depends on (split, index, seed) alone, takes about a
millisecond and is never stored.

    from demo.task import make_row
    row = make_row("plain/test", 0)
    row["images"][0].size, row["problem"], row["answer"]
"""

import itertools
import zlib
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

SIZE, CELL, DIE = 96, 32, 26  # pixels: picture, cell, die
FLOOR, UNIT, BAR = 90, 9, 20  # pixels: a chart's axis, the height of one unit, a bar's width
SCALE = 4  # a die or a bar is drawn so many times larger
COLOURS = {
    "red": (212, 52, 48),
    "blue": (40, 100, 210),
    "green": (34, 146, 78),
    "yellow": (236, 176, 28),
}
INSTRUCTION = "Reason in <think></think>, answer in \\boxed{}."

# kind -> (dice or bars it asks about, the answer from their values)
KINDS = {
    "read": (1, lambda a: a),
    "sum": (2, lambda a, b: a + b),
    "difference": (2, lambda a, b: abs(a - b)),
    "larger": (2, max),
    "sum3": (3, lambda *values: sum(values)),
}
QUESTIONS = {
    "dice": {
        "read": "How many pips does the {} die show?",
        "sum": "How many pips do the {} and {} dice show in total?",
        "difference": "How many pips apart are the {} and {} dice?",
        "larger": "How many pips does the higher of the {} and {} dice show?",
        "sum3": "How many pips do the {}, {} and {} dice show in total?",
    },
    "bars": {
        "read": "How high is the {} bar?",
        "sum": "How high are the {} and {} bars in total?",
        "difference": "How far apart are the heights of the {} and {} bars?",
        "larger": "How high is the higher of the {} and {} bars?",
        "sum3": "How high are the {}, {} and {} bars in total?",
    },
}
CELLS = {"dice": range(9), "bars": range(6, 9)}  # where a die may lie, where a bar stands
SHOWN = {"dice": 4, "bars": 3}

PLAIN = {
    "about": "a light table, white round pips, hardly any noise: the warm start's rendering",
    "shows": "dice",
    "kinds": {"read": 0.15, "sum": 0.3, "difference": 0.2, "larger": 0.15, "sum3": 0.2},
    "totals": (3, 15),  # range of the totals of three dice or bars
    "styles": ("classic",),
    "offset": 1,  # pixels that a die may lie off its cell's centre, or a chart, each way
    "background": "table",
    "noise": 4.0,  # standard deviation in grey levels of 255
}
SHIFTED = {
    "about": "two-coloured backgrounds and strong noise",
    "background": "gradient",
    "noise": 26.0,
}
STYLES = {
    "about": "square, ring-shaped or dark pips, round dice",
    "styles": ("square", "ring", "dark", "round"),
}
OFFSET = {"about": "dice up to 5 pixels off the centres of their cells, or charts", "offset": 5}
SUMS = {
    "about": "totals of three dice or bars only, and larger ones",
    "kinds": {"sum3": 1.0},
    "totals": (8, 18),
}
CHARTS = PLAIN | {
    "about": "bars on a light table, hardly any noise: the rendering of the charts' warm start",
    "shows": "bars",
    "styles": ("filled",),
}
BAR_STYLES = {
    "about": "hollow, striped, narrow or round bars",
    "styles": ("hollow", "striped", "narrow", "round"),
}
DOMAINS = {
    "plain": PLAIN,
    "shifted": PLAIN | SHIFTED,
    "styles": PLAIN | STYLES,
    "offset": PLAIN | OFFSET,
    "sums": PLAIN | SUMS,
    "charts": CHARTS,
    "charts-shifted": CHARTS | SHIFTED,
    "charts-styles": CHARTS | BAR_STYLES,
    "charts-offset": CHARTS | OFFSET,
    "charts-sums": CHARTS | SUMS,
}

# pips at (column, row) in a 3 x 3 grid
PIPS = {
    1: "11",
    2: "00 22",
    3: "00 11 22",
    4: "00 20 02 22",
    5: "00 20 11 02 22",
    6: "00 20 01 21 02 22",
    7: "00 20 01 11 21 02 22",
    8: "00 10 20 01 21 02 12 22",
    9: "00 10 20 01 11 21 02 12 22",
}


@cache
def combinations(kind: str) -> dict[int, list[tuple[int, ...]]]:
    """answer -> all values of the dice or bars asked about that give it"""
    asked, answer = KINDS[kind]
    table = {}
    for values in itertools.product(range(1, 10), repeat=asked):
        table.setdefault(answer(*values), []).append(values)
    return table


def rounded(low: int, high: int, radius: int, fill: int, down: int = 0) -> Image.Image:
    """A filled rounded square of an enlarged cell, on black.   8-bit grey"""
    image = Image.new("L", (CELL * SCALE, CELL * SCALE), 0)
    box = (low, low + down, high, high + down)
    ImageDraw.Draw(image).rounded_rectangle(box, radius, fill=fill)
    return image


@cache
def die(colour: str, pips: int, style: str) -> Image.Image:
    """One die with its shadow: RGBA of a cell's size, drawn larger and scaled down."""
    k, edge = SCALE, (CELL - DIE) // 2
    side, low, high = CELL * k, edge * k, (CELL - edge) * k - 1
    radius, step = (DIE * k // 2, 6 * k) if style == "round" else (6 * k, 7 * k)

    shadow = rounded(low + k, high + k, radius, fill=110, down=k)
    black = Image.new("L", (side, side), 0)
    layers = [black, black, black, shadow.filter(ImageFilter.GaussianBlur(k))]
    picture = Image.merge("RGBA", layers)

    outer = rounded(low, high, radius, fill=255)
    inner = rounded(low + k, high - k, radius - k, fill=255)
    light = np.linspace(1.12, 0.88, side)[:, None, None]  # lit from above
    body = np.clip(np.array(COLOURS[colour]) * light, 0, 255).astype(np.uint8).repeat(side, axis=1)
    picture.paste(Image.fromarray(body // 2 + body // 5), (0, 0), outer)  # dark rim
    picture.paste(Image.fromarray(body), (0, 0), inner)

    draw = ImageDraw.Draw(picture)
    rim = tuple(c // 2 for c in COLOURS[colour])
    fill = (30, 30, 34) if style == "dark" else (252, 252, 250)
    r = 2.7 * k
    for column, row in PIPS[pips].split():
        x, y = side / 2 + (int(column) - 1) * step, side / 2 + (int(row) - 1) * step
        box = (x - r, y - r, x + r, y + r)
        if style == "square":
            draw.rectangle(box, fill=fill, outline=rim, width=2)
        elif style == "ring":
            draw.ellipse(box, outline=fill, width=int(1.3 * k))
        else:
            draw.ellipse(box, fill=fill, outline=rim, width=2)
    return picture.resize((CELL, CELL), Image.Resampling.BOX)


@cache
def axes() -> Image.Image:
    """A chart's axis and a line for each unit of height: RGBA of the picture's size."""
    layer = Image.new("RGBA", (SIZE, SIZE))
    for height in range(10):
        y, strength = FLOOR - UNIT * height, 60 if height % 3 else 130
        line = (2, y, SIZE - 3, y)
        ImageDraw.Draw(layer).line(line, fill=(60, 60, 66, strength if height else 255))
    return layer


@cache
def bar(colour: str, value: int, style: str) -> Image.Image:
    """One bar that stands on the axis: RGBA of a column's size, drawn larger and scaled down."""
    k, width = SCALE, BAR // 2 if style == "narrow" else BAR
    low, high = (CELL - width) // 2 * k, (CELL + width) // 2 * k - 1
    top, floor = (FLOOR - UNIT * value) * k, FLOOR * k - 1
    rgb, rim = COLOURS[colour], tuple(c // 2 for c in COLOURS[colour])
    picture = Image.new("RGBA", (CELL * k, SIZE * k))
    draw = ImageDraw.Draw(picture)
    if style == "hollow":
        draw.rectangle((low, top, high, floor), fill=(252, 252, 250), outline=rgb, width=4 * k)
    elif style == "round":
        draw.rounded_rectangle((low, top, high, floor), 4 * k, fill=rgb, outline=rim, width=k)
    else:
        draw.rectangle((low, top, high, floor), fill=rgb, outline=rim, width=k)
    if style == "striped":
        for y in range(floor - 3 * k, top + k, -4 * k):
            draw.rectangle((low + k, y - k, high - k, y), fill=(252, 252, 250))
    return picture.resize((CELL, SIZE), Image.Resampling.BOX)


def draw_dice(picture: Image.Image, row: dict, style: str, offset: int, rng) -> None:
    """Each die lies off the centre of its cell by itself."""
    offsets = rng.integers(-offset, offset + 1, (len(row["cells"]), 2))
    for (colour, cell), off in zip(row["cells"].items(), offsets, strict=True):
        sprite = die(colour, row["values"][colour], style)
        corner = np.array((cell % 3, cell // 3)) * CELL + off
        x, y = np.clip(corner, -2, SIZE - CELL + 2).tolist()
        picture.paste(sprite, (x, y), sprite)


def draw_bars(picture: Image.Image, row: dict, style: str, offset: int, rng) -> None:
    """The axes and the bars lie off the centre of the picture together."""
    x, y = rng.integers(-offset, offset + 1, 2).tolist()
    picture.paste(axes(), (x, y), axes())
    for colour, cell in row["cells"].items():
        sprite = bar(colour, row["values"][colour], style)
        picture.paste(sprite, (x + cell % 3 * CELL, y), sprite)


DRAW = {"dice": draw_dice, "bars": draw_bars}


def background(name: str, rng: np.random.Generator) -> np.ndarray:
    """(SIZE, SIZE, 3) float32 grey levels"""
    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) / (SIZE - 1)
    if name == "table":
        return np.array((238, 233, 222), np.float32) * (1 - 0.06 * y + 0.02 * x)[..., None]
    angle = rng.uniform(0, 2 * np.pi)
    t = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1)[..., None]
    first, second = rng.uniform(20, 235, (2, 3))
    return ((1 - t) * first + t * second).astype(np.float32)


def make_row(split: str, index: int, seed: int = 0) -> dict:
    """Row `index` of a split such as "plain/train": {images, problem, answer, kind, values, cells}.

    values: colour -> pips of the die or height of the bar. cells: colour -> the die's cell, or the
    cell of the bar's foot, row by row. Each (split, seed, index) has its own random stream, so
    /train and /test never share one. Raises ValueError for an unknown split.
    """
    domain, _, part = split.partition("/")
    if domain not in DOMAINS or part not in ("train", "test"):
        raise ValueError(
            f"unknown split {split!r}: a domain of {sorted(DOMAINS)}, then /train or /test"
        )
    rng = np.random.default_rng([zlib.crc32(split.encode()), seed, index])
    settings = DOMAINS[domain]
    shows = settings["shows"]

    kinds = settings["kinds"]
    kind = str(rng.choice(list(kinds), p=list(kinds.values())))
    table = combinations(kind)
    low, high = settings["totals"] if kind == "sum3" else (min(table), max(table))
    answer = int(rng.integers(low, high + 1))
    asked = table[answer][rng.integers(len(table[answer]))]
    others = rng.integers(1, 10, SHOWN[shows] - len(asked)).tolist()
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))]  # asked about first
    question = QUESTIONS[shows][kind].format(*colours[: len(asked)])
    style = str(rng.choice(settings["styles"]))

    picture = Image.fromarray(background(settings["background"], rng).astype(np.uint8))
    colours = colours[: SHOWN[shows]]
    row = {
        "problem": f"{question} {INSTRUCTION}",
        "answer": str(answer),
        "kind": kind,
        "values": dict(zip(colours, [*asked, *others], strict=True)),
        "cells": dict(zip(colours, rng.permutation(CELLS[shows]).tolist(), strict=False)),
    }
    DRAW[shows](picture, row, style, settings["offset"], rng)
    noise = settings["noise"] * rng.standard_normal((SIZE, SIZE, 3), np.float32)
    noisy = np.rint(np.asarray(picture, np.float32) + noise)
    return row | {"images": [Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))]}

"""The embedded task: read coloured dice, answer a question about their pips.

A picture of 96 x 96 pixels is a 3 x 3 grid of cells of 32 pixels. With patches of 16 and 2 x 2
merging, one cell is one image token. A red, a blue, a green and a yellow die with 1 to 9 pips lie
in random cells. Answers of each kind of question are uniform over their range, so a policy that
does not look is at chance (tests/test_demo.py). A row depends on (split, index, seed) alone, takes
about a millisecond and is never stored.

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
SCALE = 4  # a die is drawn so many times larger
COLOURS = {
    "red": (212, 52, 48),
    "blue": (40, 100, 210),
    "green": (34, 146, 78),
    "yellow": (236, 176, 28),
}
INSTRUCTION = "Reason in <think></think>, answer in \\boxed{}."

# kind -> (dice it asks about, question, the answer from their pips)
KINDS = {
    "read": (1, "How many pips does the {} die show?", lambda a: a),
    "sum": (2, "How many pips do the {} and {} dice show in total?", lambda a, b: a + b),
    "difference": (2, "How many pips apart are the {} and {} dice?", lambda a, b: abs(a - b)),
    "larger": (2, "How many pips does the higher of the {} and {} dice show?", max),
    "sum3": (3, "How many pips do the {}, {} and {} dice show in total?", lambda *pips: sum(pips)),
}

PLAIN = {
    "about": "a light table, white round pips, hardly any noise: the warm start's rendering",
    "kinds": {"read": 0.15, "sum": 0.3, "difference": 0.2, "larger": 0.15, "sum3": 0.2},
    "totals": (3, 15),  # range of the totals of three dice
    "styles": ("classic",),
    "offset": 1,  # pixels that a die may lie off its cell's centre, each way
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
OFFSET = {"about": "dice up to 5 pixels off the centres of their cells", "offset": 5}
SUMS = {
    "about": "totals of three dice only, and larger ones",
    "kinds": {"sum3": 1.0},
    "totals": (8, 18),
}
DOMAINS = {
    "plain": PLAIN,
    "shifted": PLAIN | SHIFTED,
    "styles": PLAIN | STYLES,
    "offset": PLAIN | OFFSET,
    "sums": PLAIN | SUMS,
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
    """answer -> all pips of the dice asked about that give it"""
    dice, _, answer = KINDS[kind]
    table = {}
    for pips in itertools.product(range(1, 10), repeat=dice):
        table.setdefault(answer(*pips), []).append(pips)
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
    """Row `index` of a split such as "plain/train": {images, problem, answer, kind, pips, cells}.

    Each (split, seed, index) has its own random stream, so /train and /test never share one.
    Raises ValueError for an unknown split.
    """
    domain, _, part = split.partition("/")
    if domain not in DOMAINS or part not in ("train", "test"):
        raise ValueError(
            f"unknown split {split!r}: a domain of {sorted(DOMAINS)}, then /train or /test"
        )
    rng = np.random.default_rng([zlib.crc32(split.encode()), seed, index])
    settings = DOMAINS[domain]

    kinds = settings["kinds"]
    kind = str(rng.choice(list(kinds), p=list(kinds.values())))
    dice, question, _ = KINDS[kind]
    table = combinations(kind)
    low, high = settings["totals"] if kind == "sum3" else (min(table), max(table))
    answer = int(rng.integers(low, high + 1))
    asked = table[answer][rng.integers(len(table[answer]))]
    others = rng.integers(1, 10, 4 - dice).tolist()
    colours = [str(colour) for colour in rng.permutation(list(COLOURS))]  # asked about first
    pips = dict(zip(colours, [*asked, *others], strict=True))
    style = str(rng.choice(settings["styles"]))

    picture = Image.fromarray(background(settings["background"], rng).astype(np.uint8))
    cells = dict(zip(colours, rng.permutation(9)[:4].tolist(), strict=True))
    limit = settings["offset"]
    offsets = rng.integers(-limit, limit + 1, (4, 2))
    for (colour, cell), offset in zip(cells.items(), offsets, strict=True):
        sprite = die(colour, pips[colour], style)
        corner = np.array((cell % 3, cell // 3)) * CELL + offset
        x, y = np.clip(corner, -2, SIZE - CELL + 2).tolist()
        picture.paste(sprite, (x, y), sprite)
    noise = settings["noise"] * rng.standard_normal((SIZE, SIZE, 3), np.float32)
    noisy = np.rint(np.asarray(picture, np.float32) + noise)
    image = Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8))
    problem = f"{question.format(*colours[:dice])} {INSTRUCTION}"
    row = {"images": [image], "problem": problem, "answer": str(answer)}
    return row | {"kind": kind, "pips": pips, "cells": cells}

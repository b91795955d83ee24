"""The embedded task: read coloured dice, answer a question about their pips.

A picture of 96 x 96 pixels is a 3 x 3 grid of cells of 32 pixels; with patches of 16 and 2 x 2 merging, one cell is
one image token. A red, a blue, a green and a yellow die with 1 to 9 pips lie in random cells. Answers of each kind
of question are uniform over their range, so a policy that does not look is at chance (tests/test_demo.py). Any row is
made from (split, index, seed) alone, in about a millisecond; nothing is stored.

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
    "sum3": (
        3,
        "How many pips do the {}, {} and {} dice show in total?",
        lambda a, b, c: a + b + c,
    ),
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
DOMAINS = {
    "plain": PLAIN,
    "shifted": PLAIN
    | {
        "about": "two-coloured backgrounds and strong noise",
        "background": "gradient",
        "noise": 26.0,
    },
    "styles": PLAIN
    | {
        "about": "square, ring-shaped or dark pips, round dice",
        "styles": ("square", "ring", "dark", "round"),
    },
    "offset": PLAIN | {"about": "dice up to 5 pixels off the centres of their cells", "offset": 5},
    "sums": PLAIN
    | {
        "about": "totals of three dice only, and larger ones",
        "kinds": {"sum3": 1.0},
        "totals": (8, 18),
    },
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


@cache
def die(colour: str, pips: int, style: str) -> Image.Image:
    """One die with its shadow: RGBA of a cell's size, drawn four times larger and scaled down."""
    k, edge = 4, (CELL - DIE) // 2
    side, low, high = CELL * k, edge * k, (CELL - edge) * k - 1
    radius = DIE * k // 2 if style == "round" else 6 * k

    shadow = Image.new("L", (side, side), 0)
    ImageDraw.Draw(shadow).rounded_rectangle(
        (low + k, low + 2 * k, high + k, high + 2 * k), radius, fill=110
    )
    picture = Image.merge(
        "RGBA", [Image.new("L", (side, side), 0)] * 3 + [shadow.filter(ImageFilter.GaussianBlur(k))]
    )

    mask = Image.new("L", (side, side), 0)
    ImageDraw.Draw(mask).rounded_rectangle((low, low, high, high), radius, fill=255)
    inner = Image.new("L", (side, side), 0)
    ImageDraw.Draw(inner).rounded_rectangle(
        (low + k, low + k, high - k, high - k), radius - k, fill=255
    )
    light = np.linspace(1.12, 0.88, side)[:, None, None]  # lit from above
    body = np.clip(np.array(COLOURS[colour]) * light, 0, 255).astype(np.uint8).repeat(side, axis=1)
    picture.paste(Image.fromarray(body // 2 + body // 5), (0, 0), mask)  # dark rim
    picture.paste(Image.fromarray(body), (0, 0), inner)

    draw, step = ImageDraw.Draw(picture), (6 if style == "round" else 7) * k
    rim, fill = (
        tuple(c // 2 for c in COLOURS[colour]),
        (30, 30, 34) if style == "dark" else (252, 252, 250),
    )
    r = 2.7 * k
    for column, row in (map(int, pip) for pip in PIPS[pips].split()):
        x, y = side / 2 + (column - 1) * step, side / 2 + (row - 1) * step
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
    """Row number `index` of a split such as "plain/train": {images, problem, answer, kind, pips, cells}.

    Each (split, seed, index) has a random stream of its own, so /train and /test never share one.
    """
    domain, _, part = split.partition("/")
    if domain not in DOMAINS or part not in ("train", "test"):
        raise ValueError(
            f"unknown split {split!r}: a domain of {sorted(DOMAINS)}, then /train or /test"
        )
    rng = np.random.default_rng([zlib.crc32(split.encode()), seed, index])
    settings = DOMAINS[domain]

    kind = str(rng.choice(list(settings["kinds"]), p=list(settings["kinds"].values())))
    dice, question, _ = KINDS[kind]
    table = combinations(kind)
    low, high = settings["totals"] if kind == "sum3" else (min(table), max(table))
    answer = int(rng.integers(low, high + 1))
    shown = table[answer][rng.integers(len(table[answer]))] + tuple(
        int(n) for n in rng.integers(1, 10, 4 - dice)
    )
    colours = [str(c) for c in rng.permutation(list(COLOURS))]  # the first ones are asked about
    style = str(rng.choice(settings["styles"]))

    picture = Image.fromarray(background(settings["background"], rng).astype(np.uint8))
    cells, offsets = (
        rng.permutation(9)[:4],
        rng.integers(-settings["offset"], settings["offset"] + 1, (4, 2)),
    )
    for colour, pips, cell, offset in zip(colours, shown, cells, offsets, strict=True):
        sprite = die(colour, pips, style)
        x, y = np.clip(np.array((cell % 3, cell // 3)) * CELL + offset, -2, SIZE - CELL + 2)
        picture.paste(sprite, (int(x), int(y)), sprite)
    noisy = np.asarray(picture, np.float32) + settings["noise"] * rng.standard_normal(
        (SIZE, SIZE, 3), np.float32
    )
    image = Image.fromarray(np.clip(np.rint(noisy), 0, 255).astype(np.uint8))
    return {
        "images": [image],
        "problem": f"{question.format(*colours[:dice])} {INSTRUCTION}",
        "answer": str(answer),
        "kind": kind,
        "pips": dict(zip(colours, shown, strict=True)),
        "cells": dict(zip(colours, map(int, cells), strict=True)),
    }

"""The charts of demo/task.py, read back from their pixels."""

from functools import cache

import numpy as np
import pytest

from demo.task import CELL, COLOURS, DOMAINS, UNIT, make_row

ON_A_TABLE = [name for name in DOMAINS if name.startswith("charts") and "shifted" not in name]
RGB = np.array(list(COLOURS.values()))


@cache
def first_rows(domain: str) -> list[dict]:
    return [make_row(f"{domain}/train", i) for i in range(150)]


def columns(row: dict) -> list[np.ndarray]:
    """The pixels of the three columns.   (SIZE, CELL, 3) each"""
    pixels = np.asarray(row["images"][0], float)
    return [pixels[:, i * CELL : (i + 1) * CELL] for i in range(3)]


def nearest(rgb: np.ndarray) -> str:
    return list(COLOURS)[np.linalg.norm(RGB - rgb, axis=1).argmin()]


def read_coloured(column: np.ndarray) -> tuple[str, int]:
    """The bar is all that is coloured: table, axis and lines are grey."""
    coloured = np.ptp(column, axis=2) > 90
    rows = np.flatnonzero(coloured.sum(1) >= 3)
    return nearest(np.median(column[coloured], axis=0)), round((rows[-1] - rows[0] + 1) / UNIT)


def read_noisy(column: np.ndarray) -> tuple[str, int]:
    """A row of pixels belongs to the bar where its mean is nearer to the foot than to the top."""
    lines = column[:, 9:23].mean(1)  # (SIZE, 3)
    colour = nearest(lines[84:88].mean(0))
    to_bar = np.linalg.norm(lines - COLOURS[colour], axis=1)
    to_background = np.linalg.norm(lines - lines[:6].mean(0), axis=1)
    return colour, round((to_bar < to_background)[:90].sum() / UNIT)


@pytest.mark.parametrize("domain", ON_A_TABLE)
def test_the_bars_show_the_values(domain):
    for row in first_rows(domain):
        assert dict(map(read_coloured, columns(row))) == row["values"]


def test_the_bars_of_shifted_can_be_read_too():
    """By a simple rule, which errs where the background has nearly the bar's colour."""
    right = []
    for row in first_rows("charts-shifted"):
        right.append(dict(map(read_noisy, columns(row))) == row["values"])
    assert np.mean(right) > 0.85

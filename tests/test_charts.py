"""Charts: the pictures are read back, and the policy of charts can be made again."""

from functools import cache

import numpy as np
import pytest
import torch
import yaml
from conftest import ROOT
from transformers import AutoModelForImageTextToText, AutoProcessor

from demo import make_demo, measure
from demo.task import CELL, COLOURS, DOMAINS, UNIT, make_row
from study import run
from train_saei import load_config

POLICY = ROOT / "demo/confident-charts"
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


def test_the_page_of_the_data_names_every_domain():
    page = (ROOT / "docs/data.md").read_text()
    for domain in DOMAINS:
        assert f" `{domain}` |" in page


# ----------------------------------------------------------------------------------- the policy


def test_it_reads_charts_and_errs_where_they_are_shifted():
    model = AutoModelForImageTextToText.from_pretrained(POLICY).eval()
    processor = AutoProcessor.from_pretrained(POLICY)
    processor.tokenizer.padding_side = "left"
    right = {}
    for domain in ("charts", "charts-shifted"):
        rows = first_rows(domain)[:48]
        texts, _ = measure.generate(model, processor, rows, 0)
        pairs = zip(texts, rows, strict=True)
        right[domain] = np.mean([measure.correct(text, row["answer"]) for (text,), row in pairs])
    assert right["charts"] > 0.75 and 0.1 < right["charts-shifted"] < 0.5


def test_teaching_charts_gives_the_same_policy_again(tmp_path):
    """A step of each part, twice. The processor is that of the policy for dice."""
    start = AutoModelForImageTextToText.from_pretrained(ROOT / "demo/confident")
    made = []
    for name in "ab":
        make_demo.teach_charts(ROOT / "demo/confident", tmp_path / name, vision_steps=1, steps=1)
        made.append(AutoModelForImageTextToText.from_pretrained(tmp_path / name).state_dict())
    changed = 0
    for key, value in start.state_dict().items():
        assert torch.equal(made[0][key], made[1][key])
        changed += not torch.equal(made[0][key], value)
    assert changed > 10
    for path in (ROOT / "demo/confident").glob("*.json"):
        if path.name != "config.json":  # holds the version of transformers
            assert path.read_bytes() == (POLICY / path.name).read_bytes()


def test_the_study_runs_the_recipe():
    recipe = yaml.safe_load((ROOT / run.SETTINGS["bars"].recipe).read_text())
    options = run.run_options("bars-tuned", "saei", 0, smoke=False, tried={})
    shared = recipe.keys() & options.keys()
    assert shared >= {"model", "prompts_per_step", "steps"}
    assert all(recipe[name] == options[name] for name in shared)
    assert options["pgd_steps"] == load_config().saei.pgd_steps  # which the recipe leaves
    assert recipe["split"] == f"{run.SETTINGS['bars-tuned'].domains[0]}/train"
    assert run.run_options("bars", "saei", 0, smoke=False, tried={}) == options | {"lr": 1e-4}

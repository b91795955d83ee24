"""recipes/: what they promise. That each is a valid configuration: tests/test_train.py."""

from dataclasses import asdict
from pathlib import Path

import pytest
import yaml

import train_saei
from presets import PRESETS

FOLDER = Path(__file__).resolve().parent.parent / "recipes"


def load(name: str) -> train_saei.Config:
    return train_saei.load_config(["--config", str(FOLDER / f"{name}.yaml")])


def test_geometry3k_arms_have_one_budget():
    """The three arms differ in the intervention and its own settings, in nothing else."""
    arms = {arm: asdict(load(f"geometry3k_{arm}")) for arm in ("grpo", "noisyrollout", "saei")}
    own = {"output", "intervention", "adversarial_rollouts", "eps"}
    for arm in arms.values():
        assert {k: v for k, v in arm.items() if k not in own} == {k: v for k, v in arms["grpo"].items() if k not in own}
    assert [arm["intervention"] for arm in arms.values()] == ["none", "noise", "egas"]
    assert [arm["rollouts"] - arm["adversarial_rollouts"] for arm in arms.values()] == [12, 6, 6]


def test_geometry3k_arms_are_noisyrollouts():
    cfg = load("geometry3k_noisyrollout")
    assert (cfg.prompts_per_step, cfg.prompts_per_step // cfg.updates_per_step, cfg.steps) == (512, 128, 60)
    assert (cfg.lr, cfg.temperature, cfg.noise_t, cfg.clip_low, cfg.clip_high) == (1e-6, 1.0, 500.0, 0.2, 0.2)
    assert train_saei.split_work(cfg, 8) == (1, 16)


@pytest.mark.parametrize("recipe", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_name_what_exists(recipe):
    """Its own command, a preset that may be trained on, and a work share that can be split on one process."""
    cfg, text = load(recipe.stem), recipe.read_text()
    assert f"train_saei.py --config recipes/{recipe.name}" in text
    if cfg.preset:
        assert PRESETS[cfg.preset].train
    train_saei.split_work(cfg, 1)
    assert set(yaml.safe_load(text)) <= {name for name in asdict(cfg)}

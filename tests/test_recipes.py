"""recipes/: what they promise. That each is a valid configuration: tests/test_train.py."""

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config import config_args

import train_saei
from runtime.presets import PRESETS

FOLDER = Path(__file__).resolve().parent.parent / "recipes"


def load(name: str) -> train_saei.Config:
    return train_saei.load_config(["--config", str(FOLDER / f"{name}.yaml")])


def test_geometry3k_arms_have_one_budget():
    """The three arms differ in the intervention and its own settings, in nothing else."""
    arms = {arm: asdict(load(f"geometry3k_{arm}")) for arm in ("grpo", "noisyrollout", "saei")}
    own = {"output", "intervention", "adversarial_rollouts", "eps"}
    for arm in arms.values():
        assert {k: v for k, v in arm.items() if k not in own} == {
            k: v for k, v in arms["grpo"].items() if k not in own
        }
    assert [arm["intervention"] for arm in arms.values()] == ["none", "noise", "egas"]
    assert [arm["rollouts"] - arm["adversarial_rollouts"] for arm in arms.values()] == [12, 6, 6]


def test_geometry3k_arms_are_noisyrollouts():
    cfg = load("geometry3k_noisyrollout")
    assert (cfg.prompts_per_step, cfg.prompts_per_step // cfg.updates_per_step, cfg.steps) == (
        512,
        128,
        60,
    )
    assert (cfg.lr, cfg.temperature, cfg.noise_t, cfg.clip_low, cfg.clip_high) == (
        1e-6,
        1.0,
        500.0,
        0.2,
        0.2,
    )
    assert train_saei.split_work(cfg, 8) == (1, 16)


def test_geometry3k_arms_see_and_train_what_noisyrollout_does():
    for cfg in map(load, ("geometry3k_grpo", "geometry3k_noisyrollout", "geometry3k_saei")):
        assert (cfg.freeze, cfg.min_pixels, cfg.max_pixels) == ("vision", 262_144, 1_000_000)


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("accelerate/*.yaml")), ids=lambda path: path.stem
)
def test_accelerate_reads_its_configurations(path):
    """accelerate refuses unknown keys; what a DeepSpeed file says must not be said beside it."""
    config = config_args.load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}[path.stem]
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, 8, 1)
    if kind == "DEEPSPEED":
        assert set(config.deepspeed_config) == {"deepspeed_config_file", "zero3_init_flag"}
        assert config.mixed_precision is None
        engine = json.loads(
            (FOLDER.parent / config.deepspeed_config["deepspeed_config_file"]).read_text()
        )
        assert engine["zero_optimization"]["stage"] == 2 and engine["bf16"]["enabled"]
        assert (
            engine["train_micro_batch_size_per_gpu"] == 1
            and engine["gradient_accumulation_steps"] == "auto"
        )
    else:
        assert config.mixed_precision == "bf16"
    if kind == "FSDP":
        assert config.fsdp_config["fsdp_version"] == 2


def test_named_accelerate_configurations_exist():
    named = {
        x
        for path in FOLDER.glob("*.yaml")
        for x in re.findall(r"--config_file (\S+)", path.read_text())
    }
    assert named and all((FOLDER.parent / x).is_file() for x in named)


@pytest.mark.parametrize("recipe", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.stem)
def test_recipes_name_what_exists(recipe):
    """Its own command, a preset that may be trained on, and a work share that can be split on one process."""
    cfg, text = load(recipe.stem), recipe.read_text()
    assert f"train_saei.py --config recipes/{recipe.name}" in text
    if cfg.preset:
        assert PRESETS[cfg.preset].train
    train_saei.split_work(cfg, 1)
    assert set(yaml.safe_load(text)) <= {name for name in asdict(cfg)}

"""recipes/: each is a valid configuration, and keeps what it promises."""

import json
import re
from pathlib import Path

import pytest
from accelerate.commands.config import config_args

import train_saei
from runtime import args, distributed
from runtime.presets import PRESETS

FOLDER = Path(__file__).resolve().parent.parent / "recipes"
RECIPES = sorted(path.stem for path in FOLDER.glob("*.yaml"))
ARMS = ("grpo", "noisyrollout", "saei")


def load(name: str) -> train_saei.Config:
    return train_saei.load_config(["--config", str(FOLDER / f"{name}.yaml")])


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_names_what_exists_and_restates_no_default(name):
    """Its command, a preset with a training split, batches that one process can split."""
    config, text = load(name), (FOLDER / f"{name}.yaml").read_text()
    assert re.search(rf"train_saei.py( \\\n# +)? --config recipes/{name}.yaml", text)
    for path in re.findall(r"--config_file (\S+)", text):
        assert (FOLDER.parent / path).is_file(), path
    if config.data.preset:
        assert PRESETS[config.data.preset].train
    cfg = config.saei
    distributed.micro_batch_size(
        cfg.prompts_per_step, cfg.updates_per_step, config.memory.micro_prompts, 1
    )
    defaults, values = args.flat(train_saei.load_config()), args.flat(config)
    for option in re.findall(r"(?m)^(\w+):", text):
        assert values[option] != defaults[option], f"{option} is the default"


def test_the_geometry3k_arms_differ_in_the_intervention_alone():
    """They have NoisyRollout's budget, learning rate, clip, image sizes and frozen vision tower."""
    arms = [args.flat(load(f"geometry3k_{arm}")) for arm in ARMS]
    assert [arm["intervention"] for arm in arms] == ["none", "noise", "egas"]
    assert [arm["rollouts"] - arm["adversarial_rollouts"] for arm in arms] == [12, 6, 6]
    at_a_time = []  # responses
    for arm in arms:
        most = max(arm["rollouts"] - arm["adversarial_rollouts"], arm["adversarial_rollouts"])
        at_a_time.append(arm.pop("sample_prompts") * most)
    assert at_a_time == [96, 96, 96]
    for arm in arms:
        for name in ("output", "intervention", "adversarial_rollouts", "eps"):
            del arm[name]
    assert arms[0] == arms[1] == arms[2]
    published = dict(prompts_per_step=512, updates_per_step=4, steps=60, lr=1e-6, temperature=1.0)
    published |= dict(clip_low=0.2, clip_high=0.2, freeze="vision")
    published |= dict(min_pixels=262_144, max_pixels=1_000_000)
    assert arms[0] == arms[0] | published
    assert distributed.micro_batch_size(512, 4, arms[0]["micro_prompts"], processes=8) == (1, 16)


@pytest.mark.parametrize("name", ["ddp", "fsdp2", "zero2"])
def test_accelerate_reads_its_configurations(name):
    """accelerate refuses unknown keys. What DeepSpeed's own file says must not be said twice."""
    config = config_args.load_config_from_file(str(FOLDER / "accelerate" / f"{name}.yaml"))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP", "zero2": "DEEPSPEED"}[name]
    assert (config.distributed_type, config.num_processes, config.num_machines) == (kind, 8, 1)
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name != "zero2":
        assert config.mixed_precision == "bf16"
        return
    assert config.mixed_precision is None
    assert set(config.deepspeed_config) == {"deepspeed_config_file", "zero3_init_flag"}
    path = FOLDER.parent / config.deepspeed_config["deepspeed_config_file"]
    engine = json.loads(path.read_text())
    assert engine["zero_optimization"]["stage"] == 2 and engine["bf16"]["enabled"]
    assert engine["train_micro_batch_size_per_gpu"] == 1
    assert engine["gradient_accumulation_steps"] == "auto"

"""plan.py: a dry run's counts are exact, its estimates near what a tiny model of each family measures."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from transformers import AutoConfig, AutoModelForImageTextToText

import train_saei
from runtime import plan
from tests.families import KINDS, PROBLEMS, make_policy, picture, responses
from train_saei import Config
from vlm import adapt as memory
from vlm.families import FAMILIES
from vlm.policy import Policy

FACTOR = (
    1.5  # of the kept activations: the projector, the patches and what a family adds are left out
)


def without_weights(source: str | Path, folder: Path) -> str:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


def kept_bytes(policy: Policy, prompts, tokens, mask, attack: bool) -> int:
    """Storages that autograd keeps for the backward, parameters and images apart."""
    images = [x.clone().requires_grad_(attack) for x in prompts.images]
    own, kept = {x.untyped_storage().data_ptr() for x in (*policy.parameters(), *images)}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        policy.score(
            prompts.with_images(images), tokens, mask
        )  # its graph lives until all is counted
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("half", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["plain", "attack", "freeze", "lora", "checkpointing"])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_activations_are_near_the_measured_ones(kind, what, half):
    policy, cfg = make_policy(kind), Config(checkpointing=what == "checkpointing")
    prompts = policy.encode([PROBLEMS[0]] * 2, [[picture(64, 64)]] * 2)
    tokens, mask = responses(policy, 2, 8, 24)
    if half:
        policy.model.to(torch.bfloat16)
    if what == "freeze":
        memory.freeze(policy, "vision+projector")
    if what == "lora":
        memory.add_lora(policy, rank=4, seed=0)
    if what == "checkpointing":
        memory.checkpoint_layers(policy)
    with train_saei.frozen(policy) if what == "attack" else contextlib.nullcontext():
        measured = kept_bytes(policy, prompts, tokens, mask, what == "attack")
    sizes = (2, 16, prompts.ids.shape[1], 24, plan.patches_of(policy, prompts.images[:1]))
    ours = (2 if half else 4) * plan.activations(
        cfg, policy, *sizes, attack=what == "attack", half=half
    )
    assert 1 / FACTOR < ours / measured < FACTOR, (ours, measured)


@pytest.mark.parametrize(
    "changes", [{}, {"freeze": "vision"}, {"lora_rank": 3}, {"dtype": "bfloat16"}]
)
def test_parameters_are_counted_exactly(tiny, tmp_path, changes):
    cfg = Config(model=tiny, **changes)
    real = Policy.from_pretrained(tiny, cfg.dtype)
    memory.freeze(real, cfg.freeze)
    if cfg.lora_rank:
        memory.add_lora(real, cfg.lora_rank, 0)
    ours = plan.load(Config(model=without_weights(tiny, tmp_path / "model"), **changes))
    numbers = lambda policy: [
        (n, p.shape, p.dtype, p.requires_grad) for n, p in policy.named_parameters()
    ]  # noqa: E731
    assert numbers(ours) == numbers(real) and {p.device.type for p in ours.parameters()} == {"meta"}
    parts = plan.estimate(cfg, ours, 4, 2, 40, 36)
    optimizer = torch.optim.AdamW([p for p in real.parameters() if p.requires_grad])
    sum(p.float().sum() for p in optimizer.param_groups[0]["params"]).backward()
    optimizer.step()
    state = [x for s in optimizer.state.values() for x in s.values() if x.ndim]
    assert parts["AdamW's state"] == sum(x.nbytes for x in state)
    assert parts["parameters"] == sum(p.nbytes for p in real.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)


def test_the_cache_of_sampling_is_the_measured_one(policy, rows, monkeypatch):
    seen, before = [], Policy.respond

    def respond(self, tokens, cache, *rest):
        out = before(self, tokens, cache, *rest)
        seen.append(sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)))
        return out

    monkeypatch.setattr(Policy, "respond", respond)
    prompts = policy.encode([r["problem"] for r in rows[:2]], [r["images"] for r in rows[:2]])
    policy.eos_ids, L = [10**6], prompts.ids.shape[1]  # none ends
    policy.sample(prompts, 3, [0, 1], 8)
    cfg = Config(rollouts=6, adversarial_rollouts=3, max_new_tokens=8)
    ours = plan.estimate(cfg, policy, 2, 2, L, 36)["sampling: keys and values"]
    assert max(seen) == ours
    few = plan.estimate(Config(sample_prompts=4), policy, 16, 2, L, 36)["sampling: keys and values"]
    assert few * 4 == plan.estimate(Config(), policy, 16, 2, L, 36)["sampling: keys and values"]


def test_what_is_done_a_few_at_a_time_is_estimated_so(policy):
    few = plan.estimate(Config(micro_responses=8), policy, 16, 2, 40, 36)
    one = plan.estimate(Config(micro_prompts=2), policy, 16, 2, 40, 36)
    assert few["update: activations"] == 4 * plan.activations(
        Config(), policy, 2, 8, 40, 64, 36, False
    )
    assert one["update: activations"] == 4 * plan.activations(
        Config(), policy, 2, 16, 40, 64, 36, False
    )
    assert few["attack: activations"] == 4 * plan.activations(
        Config(), policy, 2, 8, 40, 64, 36, True
    )


def test_the_peak_is_that_of_one_phase():
    parts = {
        "a": 5,
        "b": 2,
        "update: x": 10,
        "attack: x": 11,
        "update, attack: y": 3,
        "sampling: z": 13,
    }
    assert plan.peak(parts) == 7 + 11 + 3
    assert plan.peak(parts | {"sampling: z": 15}) == 7 + 15


def test_autocast_and_processes_cost(policy, monkeypatch):
    alone = plan.estimate(Config(), policy, 4, 2, 40, 36)
    assert plan.estimate(Config(), policy, 4, 2, 40, 36, 2)["DDP's buckets"] == alone["gradients"]
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    half = plan.estimate(Config(kl_coef=0.1), policy, 4, 2, 40, 36)
    assert (
        1.2 < alone["update: activations"] / half["update: activations"] < 2
    )  # norms stay in float32
    assert (
        half["reference"]
        == half["parameters"]
        == alone["parameters"]
        > half["autocast's copies of weights"] * 1.9
    )


def test_dry_run_without_weights_trains_and_writes_nothing(tiny, tmp_path, capsys, monkeypatch):
    model, out = without_weights(tiny, tmp_path / "model"), tmp_path / "out"
    cfg = dict(
        model=model, output=str(out), dry_run=True, steps=5, prompts_per_step=8, updates_per_step=2
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    train_saei.main(Config(**cfg, micro_prompts=2, micro_responses=6, sample_prompts=3))
    said = capsys.readouterr().out
    settings, lines = said.split("\n\n")[:2]
    assert yaml.safe_load(settings)["steps"] == 5 and "optimiser steps 10" in lines
    count = sum(p.numel() for p in Policy.from_pretrained(tiny).parameters())
    assert f"qwen2_5_vl, {count:,} parameters, {count:,} trained" in lines
    assert (
        "8 prompts x 8 responses = 64 rollouts (4 of 8 adversarial)" in lines
        and "1,000,000 rows" in lines
    )
    assert (
        "samples 4 prompts, 16 + 16 responses, 3 prompts at a time; updates 2 prompts, 6 responses at a time"
        in lines
    )
    assert "at most 9 a prompt" in lines and "96 x 96" in lines  # 96 / (16 * 2) squared
    assert not out.exists()
    monkeypatch.setenv("RANK", "1")
    train_saei.main(Config(**cfg))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_can_be_planned(kind, tmp_path, capsys):
    make_policy(kind).save_pretrained(tmp_path / "all")
    picture(40, 40).save(tmp_path / "a.png")
    (tmp_path / "rows.jsonl").write_text(
        '{"image": "a.png", "problem": "how many dots ?", "answer": "1"}\n'
    )
    model = without_weights(tmp_path / "all", tmp_path / "model")
    cfg = Config(
        model=model, dataset=str(tmp_path / "rows.jsonl"), dry_run=True, streaming=kind == "gemma3"
    )
    train_saei.main(cfg)
    said = capsys.readouterr().out
    policy = make_policy(kind)
    row = {"problem": "how many dots ?", "images": [picture(40, 40)]}
    text = policy.prompt_tokens({"problem": "how many dots ?", "images": []})
    (tokens,) = [
        int(line.split("at most ")[1].split()[0])
        for line in said.splitlines()
        if "image tokens" in line
    ]
    assert 4 <= tokens <= policy.prompt_tokens(row) - text
    assert ("streamed" if kind == "gemma3" else "1 rows") in said


QWEN = {  # of the released configurations, what differs; the counts are those of the released weights
    "3B": (
        dict(
            hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16
        ),
        3_754_622_976,
    ),
    "7B": (
        dict(
            hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28
        ),
        8_292_166_656,
    ),
}


def released(size: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Qwen2.5-VL of that size on the meta device."""
    text, _ = QWEN[size]
    kv, tied, vocabulary = (2, True, 151_936) if size == "3B" else (4, False, 152_064)
    vision = dict(
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=text["hidden_size"],
    )
    text = text | dict(num_key_value_heads=kv, vocab_size=vocabulary, tie_word_embeddings=tied)
    config = AutoConfig.for_model(
        "qwen2_5_vl", text_config=text, vision_config=vision, tie_word_embeddings=tied
    )
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


@pytest.mark.parametrize("size", QWEN)
def test_parameters_of_released_models(size):
    assert sum(p.numel() for p in released(size).parameters()) == QWEN[size][1]


def test_a_dry_run_is_no_other_run(tiny, tmp_path):
    """--dry_run of a run that is under way, to be resumed, does not count as another configuration."""
    from runtime import run as runs

    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**vars(Config()), "dry_run": True}))
    runs.same_config(Config(), tmp_path / "config.yaml")


def test_the_lora_recipes_memory_is_the_formulas():
    """The figures in its comment, of one GPU without autocast."""
    recipe = ROOT / "recipes/geometry3k_lora.yaml"
    cfg = train_saei.load_config(["--config", str(recipe)])
    policy = Policy.__new__(Policy)  # without a processor, which estimate does not ask
    torch.nn.Module.__init__(policy)
    policy.model, policy.family = released("3B", getattr(torch, cfg.dtype)), FAMILIES["qwen2_5_vl"]
    policy.banned = torch.zeros(151_936, dtype=torch.bool)
    memory.add_lora(policy, cfg.lora_rank, 0)
    patches = cfg.max_pixels // 14**2
    parts = plan.estimate(
        cfg, policy, cfg.prompts_per_step, cfg.micro_prompts, cfg.max_prompt_tokens, patches
    )
    total = plan.peak(parts)
    parts["in all, of phases the largest"] = total
    said = re.findall(r"^#   (\S.*?)  +([\d.]+)$", recipe.read_text(), re.MULTILINE)
    assert said == [(name, f"{n / 2**30:.2f}") for name, n in parts.items()]
    assert total < 20 * 2**30  # of 24 GB, and room for what is not estimated


def test_a_frozen_tower_keeps_nothing_but_for_the_attack(policy):
    memory.freeze(policy, "vision")
    few, many = (
        [plan.activations(Config(), policy, 2, 8, 40, 64, n, attack) for attack in (False, True)]
        for n in (4, 9)
    )
    assert few[0] == many[0] and few[1] < many[1]


def test_sdpa_repeats_keys_and_values_for_the_heads(policy):
    """4 heads of 32, 2 of them keys': 2 x 64 numbers more a layer and attended key, of 4 layers."""
    sdpa, flash = (
        plan.activations(Config(attention=x), policy, 2, 8, 40, 64, 0, False)
        for x in ("sdpa", "flash_attention_2")
    )
    assert sdpa - flash == 4 * 2 * 64 * (2 * 40 + 8 * (40 + 64))

"""runtime/plan.py: counts are exact, estimates near what tiny models of each family measure."""

import contextlib
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT
from transformers import AutoConfig, AutoModelForImageTextToText

from runtime import args, distributed, plan
from runtime.plan import Work, activations, estimate
from tests.families import KINDS, PROBLEMS, make_policy, picture, responses
from train_saei import load_config, main
from vlm import adapt
from vlm.families import FAMILIES
from vlm.policy import Policy

FACTOR = 1.5  # the projector, the patches and what a family adds are left out


def without_weights(source: str | Path, folder: Path) -> str:
    shutil.copytree(source, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


def kept_bytes(policy: Policy, prompts, tokens, mask, attack: bool) -> int:
    """Storages that autograd keeps for the backward, without parameters and images."""
    images = [x.clone().requires_grad_(attack) for x in prompts.images]
    given, kept = {x.untyped_storage().data_ptr() for x in (*policy.parameters(), *images)}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        # Its graph lives until all is counted.
        _ = policy.score(prompts.with_images(images), tokens, mask)
    return sum(storage.nbytes() for storage in kept.values())


MEMORY = {"freeze": {"freeze": "vision+projector"}, "lora": {"lora_rank": 4}}
MEMORY["checkpointing"] = {"gradient_checkpointing": True}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["plain", "attack", *MEMORY])
@pytest.mark.parametrize("kind", KINDS)
def test_kept_activations_are_near_the_measured_ones(kind, what, dtype):
    policy, attack = make_policy(kind), what == "attack"
    config = load_config(max_new_tokens=24, dtype=dtype, **MEMORY.get(what, {}))
    prompts = policy.encode([PROBLEMS[0]] * 2, [[picture(64, 64)]] * 2)
    tokens, mask = responses(policy, 2, 8, 24)
    policy.model.to(getattr(torch, dtype))
    config.memory.apply(policy, seed=0)
    with distributed.frozen(policy) if attack else contextlib.nullcontext():
        measured = kept_bytes(policy, prompts, tokens, mask, attack)
    work = Work(2, 2, prompts.ids.shape[1], plan.patches_of(policy, prompts.images[:1]))
    ours = plan.number_bytes(config) * activations(config, policy, work, 16, attack)
    # Linear attention is estimated as by fla's kernels. Without them the library keeps several
    # matrices of 64 x 64 for each chunk of 64 tokens, and here every response fills one.
    linear = "linear_attention" in getattr(policy.model.config.get_text_config(), "layer_types", ())
    least = 0.1 if linear and what != "checkpointing" else 1 / FACTOR
    if kind.startswith(("minicpm", "gemma3n", "gemma4")) and what == "checkpointing":
        least = 0.5  # what lies outside the layers: attention in a merger, embeddings per layer
    assert least < ours / measured < FACTOR, (ours, measured)


@pytest.mark.parametrize(
    "changes", [{}, {"freeze": "vision"}, {"lora_rank": 3}, {"dtype": "bfloat16"}], ids=str
)
def test_parameters_are_counted_exactly(tiny, tmp_path, changes):
    config = load_config(model=without_weights(tiny, tmp_path / "model"), **changes)
    ours, real = config.model.load(weights=False), Policy.from_pretrained(tiny, config.model.dtype)
    numbers = []
    for policy in (ours, real):
        config.memory.apply(policy, seed=0)
        named = policy.named_parameters()
        numbers.append([(name, p.shape, p.dtype, p.requires_grad) for name, p in named])
    assert numbers[0] == numbers[1] and {p.device.type for p in ours.parameters()} == {"meta"}
    parts = estimate(config, ours, Work(4, 2, 40, 36))
    optimizer = torch.optim.AdamW([p for p in real.parameters() if p.requires_grad])
    sum(p.float().sum() for p in optimizer.param_groups[0]["params"]).backward()
    optimizer.step()
    state = [x for s in optimizer.state.values() for x in s.values() if x.ndim]
    assert parts["AdamW's state"] == sum(x.nbytes for x in state)
    assert parts["parameters"] == sum(p.nbytes for p in real.parameters())
    assert parts["gradients"] == sum(p.grad.nbytes for p in real.parameters() if p.grad is not None)


def test_the_cache_of_sampling_is_the_measured_one(policy, rows, monkeypatch):
    seen, respond = [], Policy.respond

    def listen(self, tokens, cache, *rest):
        out = respond(self, tokens, cache, *rest)
        seen.append(sum(x.nbytes for layer in cache.layers for x in (layer.keys, layer.values)))
        return out

    monkeypatch.setattr(Policy, "respond", listen)
    prompts = policy.encode([r["problem"] for r in rows[:2]], [r["images"] for r in rows[:2]])
    policy.eos_ids, L = [10**6], prompts.ids.shape[1]  # none ends
    policy.sample(prompts, 3, [0, 1], 8)
    config = load_config(rollouts=6, adversarial_rollouts=3, max_new_tokens=8)
    name = "sampling: keys and values"
    assert max(seen) == estimate(config, policy, Work(2, 2, L, 36))[name]
    of_4, of_16 = (load_config(sample_prompts=n) for n in (4, 0))
    work = Work(16, 2, L, 36)
    assert estimate(of_4, policy, work)[name] * 4 == estimate(of_16, policy, work)[name]


def test_what_is_done_in_chunks_is_estimated_so(policy):
    work, config = Work(16, 2, 40, 36), load_config()
    chunks = estimate(load_config(micro_responses=8), policy, work)
    whole = estimate(config, policy, work)
    for phase, attack, n in (("update", False, 16), ("attack", True, 8)):
        name = f"{phase}: activations"
        assert chunks[name] == 4 * activations(config, policy, work, 8, attack)
        assert whole[name] == 4 * activations(config, policy, work, n, attack)


def test_the_peak_is_that_of_one_phase():
    parts = {"a": 5, "b": 2, "update: x": 10, "attack: x": 11, "update, attack: y": 3}
    assert plan.peak(parts | {"sampling: z": 13}) == 7 + 11 + 3
    assert plan.peak(parts | {"sampling: z": 15}) == 7 + 15


def test_autocast_and_processes_cost(policy, monkeypatch):
    work, name = Work(4, 2, 40, 36), "update: activations"
    alone = estimate(load_config(), policy, work)
    two = estimate(load_config(), policy, work._replace(processes=2))
    assert two["DDP's buckets"] == alone["gradients"] and "DDP's buckets" not in alone
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    half = estimate(load_config(kl_coef=0.1), policy, work)
    assert 1.2 < alone[name] / half[name] < 2  # norms stay in float32
    assert half["reference"] == half["parameters"] == alone["parameters"]
    assert half["parameters"] > half["autocast's copies of weights"] * 1.9


def test_a_frozen_tower_keeps_nothing_but_for_the_attack(policy):
    adapt.freeze(policy, "vision")
    small, large = Work(2, 2, 40, 4), Work(2, 2, 40, 9)
    kept = []
    for attack in (False, True):
        kept.append([activations(load_config(), policy, w, 8, attack) for w in (small, large)])
    assert kept[0][0] == kept[0][1] and kept[1][0] < kept[1][1]


def test_sdpa_repeats_keys_and_values_for_the_heads(policy):
    """4 heads of 32, 2 of them keys': 2 x 64 numbers per layer and attended key, of 4 layers."""
    kept = []
    for attention in ("sdpa", "flash_attention_2"):
        config = load_config(attention=attention, max_new_tokens=64)
        kept.append(activations(config, policy, Work(2, 2, 40, 0), 8, False))
    assert kept[0] - kept[1] == 4 * 2 * 64 * (2 * 40 + 8 * (40 + 64))


# ------------------------------------------------------------------------------------ the dry run


def test_dry_run_without_weights_trains_and_writes_nothing(tiny, tmp_path, capsys, monkeypatch):
    model, out = without_weights(tiny, tmp_path / "model"), tmp_path / "out"
    options = dict(model=model, output=str(out), dry_run=True, steps=5, prompts_per_step=8)
    options |= dict(updates_per_step=2, micro_prompts=2, micro_responses=6, sample_prompts=3)
    config = load_config(**options)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    main(config)
    lines, memory, settings, end = capsys.readouterr().out.split("\n\n")
    title, settings = settings.split("\n", 1)
    assert title == "Settings that differ from the defaults:"
    assert yaml.safe_load(settings) == options
    assert end == "dry run: nothing was trained or written\n"
    count = sum(p.numel() for p in Policy.from_pretrained(tiny).parameters())
    for said in (
        f"qwen2_5_vl, {count:,} parameters, {count:,} trained",
        "96 x 96",
        "at most 9 per prompt",  # 96 / (16 * 2) squared
        "1,000,000 rows",
        "updates 10",
        "8 prompts x 8 responses, 4 of 8 adversarial",
        "one of 2: 4 prompts; samples 3 at a time, updates 2 prompts and 6 responses at a time",
    ):
        assert said in lines, said
    assert memory.splitlines()[-1].startswith("  FSDP2: in all ") and not out.exists()
    monkeypatch.setenv("RANK", "1")
    main(config)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    "options, said",
    [
        ({}, "45.06 GB each, 3 written, 2 kept: at most 135.17 GB on the disk"),
        ({"keep_last": 0}, "45.06 GB each, 3 written, all kept: at most 135.17 GB on the disk"),
        ({"steps": 50}, "45.06 GB each, 1 written, all kept: at most 45.06 GB on the disk"),
        ({"steps": 500}, "45.06 GB each, 10 written, 2 kept: at most 135.17 GB on the disk"),
        ({"keep_last": 1}, "45.06 GB each, 3 written, 1 kept: at most 90.11 GB on the disk"),
    ],
    ids=str,
)
def test_the_disk_that_checkpoints_take(options, said):
    """3B in float32 with AdamW's state: 12 bytes a parameter."""
    size = 12 * QWEN["3B"][-1]
    assert plan.disk(size, args.RunArgs(**{"steps": 101} | options)) == said


@pytest.mark.parametrize("kind", KINDS)
def test_every_family_can_be_planned(kind, tmp_path):
    policy, image, problem = make_policy(kind), picture(40, 40), "how many dots ?"
    policy.save_pretrained(tmp_path / "all")
    image.save(tmp_path / "a.png")
    rows, streaming = tmp_path / "rows.jsonl", kind == "gemma3"
    rows.write_text('{"image": "a.png", "problem": "how many dots ?", "answer": "1"}\n')
    model = without_weights(tmp_path / "all", tmp_path / "model")
    text = plan.describe(load_config(model=model, dataset=str(rows), streaming=streaming))
    tokens = int(re.search(r"image tokens: +at most (\d+)", text)[1])
    with_image, alone = ({"problem": problem, "images": x} for x in ([image], []))
    assert 4 <= tokens <= policy.prompt_tokens(with_image) - policy.prompt_tokens(alone)
    assert ("streamed" if streaming else "1 rows") in text


# ------------------------------------------------------------------------------- released models

# Of the released configurations, what differs. The counts are those of the released weights.
QWEN = {
    "3B": (2048, 11008, 36, 16, 2, 151_936, True, 3_754_622_976),
    "7B": (3584, 18944, 28, 28, 4, 152_064, False, 8_292_166_656),
}
NAMES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
NAMES += ("num_key_value_heads", "vocab_size", "tie_word_embeddings")


def released(size: str, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """Qwen2.5-VL of that size on the meta device."""
    text = dict(zip(NAMES, QWEN[size], strict=False))
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16)
    vision["out_hidden_size"] = text["hidden_size"]
    parts = dict(text_config=text, vision_config=vision)
    tied = text["tie_word_embeddings"]
    config = AutoConfig.for_model("qwen2_5_vl", tie_word_embeddings=tied, **parts)
    with torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config, dtype=dtype)


@pytest.mark.parametrize("size", QWEN)
def test_parameters_of_released_models(size):
    assert sum(p.numel() for p in released(size).parameters()) == QWEN[size][-1]


def test_the_lora_recipes_memory_is_the_formulas():
    """The figures in its comment, of one GPU without autocast."""
    recipe = ROOT / "recipes/geometry3k_lora.yaml"
    config = load_config(["--config", str(recipe)])
    policy = Policy.__new__(Policy)  # without a processor, which estimate does not ask
    torch.nn.Module.__init__(policy)
    policy.model = released("3B", getattr(torch, config.model.dtype))
    policy.family = FAMILIES["qwen2_5_vl"]
    policy.banned = torch.zeros(151_936, dtype=torch.bool)
    adapt.add_lora(policy, config.memory.lora_rank, 0)
    patches = config.model.max_pixels // 14**2
    prompts, micro = config.saei.prompts_per_step, config.memory.micro_prompts
    parts = estimate(config, policy, Work(prompts, micro, config.data.max_prompt_tokens, patches))
    total = plan.peak(parts)
    parts["in all, with the largest phase"] = total
    said = re.findall(r"^#   (\S.*?)  +([\d.]+)$", recipe.read_text(), re.MULTILINE)
    assert said == [(name, f"{n / 2**30:.2f}") for name, n in parts.items()]
    assert total < 20 * 2**30  # of 24 GB, and room for what is not estimated

"""runtime/memory.py: counts are exact, estimates near what tiny models of each family measure."""

import contextlib
import json
import os
import re
from functools import partial
from unittest import mock

import pytest
import torch
import torch.testing._internal.distributed.fake_pg
from conftest import ROOT
from torch.distributed.fsdp import fully_shard

from benchmarks import models, plans, tables
from runtime import distributed, memory, plan
from runtime.memory import Launch, Work, activations, estimate, prompts_kept
from tests.families import KINDS, PROBLEMS, make_policy, picture, responses
from train_saei import load_config
from vlm import adapt
from vlm.policy import Policy

FACTOR = 1.5  # the projector, the patches and what a family adds are left out


def kept_bytes(policy: Policy, compute, images=()) -> int:
    """Storages that autograd keeps for the backward of compute(), without parameters and images."""
    given, kept = {x.untyped_storage().data_ptr() for x in (*policy.parameters(), *images)}, {}

    def pack(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in given:
            kept[storage.data_ptr()] = storage
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _ = compute()  # its graph lives until all is counted
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
    images = [x.clone().requires_grad_(attack) for x in prompts.images]
    score = partial(policy.score, prompts.with_images(images), tokens, mask)
    with distributed.frozen(policy) if attack else contextlib.nullcontext():
        measured = kept_bytes(policy, score, images)
    work = Work(2, 2, prompts.ids.shape[1], plan.patches_of(policy, prompts.images[:1]), 24)
    half = dtype == "bfloat16"
    ours = (2 if half else 4) * activations(config, policy, work, 16, attack, half)
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
def test_parameters_are_counted_exactly(tiny, changes):
    config = load_config(model=tiny, **changes)
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
    work, config = Work(16, 2, 40, 36, 64), load_config()
    chunks = estimate(load_config(micro_responses=8), policy, work)
    whole = estimate(config, policy, work)
    for phase, attack, n in (("update", False, 16), ("attack", True, 8)):
        name = f"{phase}: activations"
        assert chunks[name] == 4 * activations(config, policy, work, 8, attack, False)
        assert whole[name] == 4 * activations(config, policy, work, n, attack, False)


def test_an_engine_samples_in_its_own_memory(policy):
    own, engine = (
        estimate(load_config(engine=[x]), policy, WORK, Launch()) for x in ("own", "vllm")
    )
    assert own.keys() - engine.keys() == {"sampling: keys and values", "sampling: logits"}
    assert engine == {name: own[name] for name in engine}


def test_the_peak_is_that_of_one_phase():
    parts = {"a": 5, "b": 2, "update: x": 10, "attack: x": 11, "update, attack: y": 3}
    assert memory.peak(parts | {"sampling: z": 13}) == 7 + 11 + 3
    assert memory.peak(parts | {"sampling: z": 15}) == 7 + 15


def test_a_frozen_tower_keeps_nothing_but_for_the_attack(policy):
    adapt.freeze(policy, "vision")
    kept = []
    for attack in (False, True):
        sizes = [Work(2, 2, 40, patches, 24) for patches in (4, 9)]
        kept.append([activations(load_config(), policy, w, 8, attack, False) for w in sizes])
    assert kept[0][0] == kept[0][1] and kept[1][0] < kept[1][1]


def test_sdpa_repeats_keys_and_values_for_the_heads(policy):
    """4 heads of 32, 2 of them keys': 2 x 64 numbers per layer and attended key, of 4 layers."""
    kept = []
    for attention in ("sdpa", "flash_attention_2"):
        config = load_config(attention=attention)
        kept.append(activations(config, policy, Work(2, 2, 40, 0, 64), 8, False, False))
    assert kept[0] - kept[1] == 4 * 2 * 64 * (2 * 40 + 8 * (40 + 64))


# ------------------------------------------------------------------ one pass for the whole step


@pytest.mark.parametrize("changes", [{}, {"freeze": "vision"}, {"lora_rank": 4}], ids=str)
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl", "gemma3"])
def test_the_kept_pass_over_the_prompts_is_near_the_measured_one(kind, changes):
    """It has the graph to the parameters and the one to the pixels."""
    policy, config = make_policy(kind), load_config(**changes)
    config.memory.apply(policy, seed=0)
    prompts = policy.encode([PROBLEMS[0]] * 8, [[picture(64, 64)]] * 8)
    measured = kept_bytes(policy, partial(policy.read, prompts, to_pixels=True))
    patches = plan.patches_of(policy, prompts.images[:1])
    work = Work(8, 2, prompts.ids.shape[1], patches, 24, one_pass=True)
    parts = estimate(config, policy, work, Launch())
    ours = parts["one pass over the prompts, kept"]
    assert ours == 4 * prompts_kept(config, policy, work, 8, False, True, True)
    assert 1 / FACTOR < ours / measured < FACTOR, (ours, measured)


def test_what_one_pass_keeps_is_not_computed_again(policy):
    """The clean responses' scores serve the update, and the first PGD step."""
    work = Work(4, 4, 40, 36, 24, one_pass=True)
    one, three = (estimate(load_config(pgd_steps=n), policy, work, Launch()) for n in (1, 3))
    assert "attack: activations" not in one and "attack: activations" in three
    kept = partial(memory.responses_kept, load_config(), policy, work, half=False, trains=True)
    assert one["the clean responses' pass, kept"] == 4 * kept(4 * 4)
    assert one["update: activations"] == 4 * kept(4 * 4)
    plain = estimate(load_config(intervention="none"), policy, work, Launch())
    assert "the clean responses' pass, kept" not in plain
    assert plain["update: activations"] == 4 * kept(4 * 8)
    chunked = estimate(load_config(micro_responses=2), policy, work, Launch())
    assert "the clean responses' pass, kept" not in chunked  # each chunk is computed again


@pytest.mark.parametrize("way, processes", [("DDP", 2), ("FSDP2", 2), ("ZeRO-2", 2), ("DDP", 1)])
def test_the_pass_is_kept_where_training_keeps_it(way, processes):
    """One micro-batch per update, and parameters that are whole."""
    for micro in (2, 8):
        config = load_config(prompts_per_step=16, micro_prompts=micro)
        work = plan.work_of(config, Launch(processes, way), 40, 36, 24)
        assert work.one_pass == (way == "DDP" and processes * micro == 16), (micro, work)


# -------------------------------------------------------------------------------- ways of spreading

WORK = Work(4, 2, 40, 36, 24)
BF16 = {"ACCELERATE_MIXED_PRECISION": "bf16"}
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "WORLD_SIZE": "8"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "WORLD_SIZE": "8"}


@pytest.mark.parametrize(
    "environment, launch",
    [
        ({}, Launch()),
        (BF16, Launch(1, "one process", True)),
        ({"WORLD_SIZE": "2"}, Launch(2, "DDP")),
        (FSDP, Launch(8, "FSDP2")),
        (FSDP | BF16, Launch(8, "FSDP2", True)),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"} | BF16, Launch(8, "ZeRO-1", True)),
        (
            ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "recipes/accelerate/zero2.json"},
            Launch(8, "ZeRO-2", True),
        ),
    ],
    ids=str,
)
def test_the_launch_is_what_accelerate_says(environment, launch, monkeypatch):
    monkeypatch.chdir(ROOT)
    with mock.patch.dict(os.environ, environment, clear=True):
        assert memory.read_launch() == launch


def test_a_launch_that_training_refuses_is_refused(tmp_path):
    path = tmp_path / "zero3.json"
    path.write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    refused = [(FSDP | {"FSDP_VERSION": "1"}, "FSDP version 1")]
    refused.append((ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}, "ZeRO-3"))
    for environment, said in refused:
        with mock.patch.dict(os.environ, environment), pytest.raises(ValueError, match=said):
            memory.read_launch()


def test_ddp_holds_no_second_copy_of_the_gradients(policy):
    """They are the buckets (gradient_as_bucket_view)."""
    assert estimate(load_config(), policy, WORK, Launch(2, "DDP")) == estimate(
        load_config(), policy, WORK, Launch()
    )


def test_fsdp2_shards_the_state_and_gathers_the_rest(policy):
    """What is gathered is bfloat16. The root: embedding (the head too), tower, last norm."""
    alone = estimate(load_config(), policy, WORK, Launch())
    parts = estimate(load_config(), policy, WORK, Launch(4, "FSDP2", True))
    for name in ("parameters", "gradients", "AdamW's state"):
        assert parts[name] == alone[name] // 4
    count = sum(p.numel() for p in policy.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in policy.language_layers()]
    root = count - sum(layers)
    assert parts["attack, sampling: whole parameters"] == 2 * count
    assert parts["update: root, parameters and gradients"] == 4 * root
    assert parts["update: two layers, the same"] == (2 * 2 + 2 + 8) * max(layers)
    assert parts["reduction: gradients of the root"] == 6 * root
    adapt.freeze(policy, "vision")
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad) - sum(layers)
    parts = estimate(load_config(), policy, WORK, Launch(4, "FSDP2", True))
    assert parts["reduction: gradients of the root"] == 6 * trained
    assert parts["update: root, parameters and gradients"] == 2 * (root + trained)


@pytest.fixture
def one_of_four():
    """The first of four processes that do not exist: collectives do nothing."""
    if torch.distributed.is_initialized():
        pytest.skip("another test has left its process group")
    store = torch.testing._internal.distributed.fake_pg.FakeStore()
    torch.distributed.init_process_group("fake", rank=0, world_size=4, store=store)
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (4,))
    torch.distributed.destroy_process_group()


def test_fsdp2s_shards_and_root_are_those_of_torch(policy, one_of_four):
    """Sharded as accelerate does: each of _no_split_modules is a unit, the root has the rest."""
    planned = estimate(load_config(), policy, WORK, Launch(4, "FSDP2"))
    units = [m for m in policy.modules() if type(m).__name__ in policy._no_split_modules]
    for module in [*units, policy]:
        fully_shard(module, mesh=one_of_four)
    local = sum(p.to_local().nbytes for p in policy.parameters())
    assert abs(local - planned["parameters"]) < 0.02 * local  # the last shards may be smaller
    root = policy._get_fsdp_state()._fsdp_param_group.fsdp_params
    count = sum(x._orig_size.numel() for x in root)
    assert planned["update: root, parameters and gradients"] == 4 * 2 * count


def test_zero_2_computes_in_bfloat16_and_shards_float32_state(policy):
    parts = estimate(load_config(kl_coef=0.1), policy, WORK, Launch(4, "ZeRO-2", True))
    count = sum(p.numel() for p in policy.parameters())
    assert parts["parameters"] == parts["reference"] == 2 * count
    assert parts["gradients"] == 2 * count // 4 and parts["AdamW's state"] == 12 * count // 4
    stage_1 = estimate(load_config(), policy, WORK, Launch(4, "ZeRO-1", True))
    assert stage_1["gradients"] == 2 * count and stage_1["AdamW's state"] == 12 * count // 4


def test_autocast_keeps_copies_of_trained_matrices_and_frozen_ones_alone(policy):
    name, config = "update: activations", load_config(kl_coef=0.1)
    alone = estimate(config, policy, WORK, Launch())
    half = estimate(config, policy, WORK, Launch(bfloat16=True))
    assert 1.2 < alone[name] / half[name] < 2  # norms stay in float32
    assert half["parameters"] == alone["parameters"] == alone["reference"]
    copies = half["autocast's copies of weights"]
    assert alone["parameters"] > 1.9 * copies > 0.9 * alone["parameters"]
    assert half["reference"] == alone["reference"] - copies
    adapt.freeze(policy, "vision+projector")
    frozen = estimate(config, policy, WORK, Launch(bfloat16=True))
    less = copies - frozen["autocast's copies of weights"]
    assert less > 0 and frozen["parameters"] == half["parameters"] - less


# ------------------------------------------------------------------------------------- the recipes


@pytest.mark.parametrize("recipe", plans.CARDS)
def test_a_gpu_recipe_fits_its_card_and_says_what_is_planned(recipe):
    text = (ROOT / f"recipes/{recipe}.yaml").read_text()
    assert text == plans.with_figure(recipe), "run python -m benchmarks.plans"
    assert "\n# Planned: " in text
    peak = memory.peak(plans.planned(recipe, plans.command(recipe)))
    assert peak < plans.ROOM * plans.card_bytes(recipe)


@pytest.mark.parametrize("name", plans.PAGES)
def test_the_tables_of_plans_are_those_of_the_recipes(name):
    page = (ROOT / name).read_text()
    assert tables.fill(page, plans.PAGES[name]) == page, "run python -m benchmarks.plans"


def test_every_recipe_for_a_gpu_is_planned():
    demo = {"demo", "charts", "easy_vqa", "elicit"}
    found = {path.stem for path in (ROOT / "recipes").glob("*.yaml")}
    assert found == plans.CARDS.keys() | demo


@pytest.mark.parametrize("recipe, words", list(plans.lines()), ids=lambda x: str(x)[:60])
def test_plan_and_hand_arithmetic_agree(recipe, words):
    """By hand, activations are the layers' inputs. SmolVLM's layers keep more."""
    planned, hand = memory.peak(plans.planned(recipe, words)), plans.by_hand(recipe, words)
    total = 2**30 * (hand.pop("state") + max(hand.values()))
    if recipe == "smolvlm_small_gpu":
        assert total < planned
    else:
        assert 0.88 < total / planned < 1.05, (total, planned)


def test_the_hand_arithmetic_of_7b_and_of_lora():
    """What was computed with pencil and paper before the plan knew FSDP2 and ZeRO-2, in GiB."""
    config, policy = plans.load("geometry3k_saei")
    fewer = load_config(["--config", str(ROOT / "recipes/geometry3k_saei.yaml")], sample_prompts=8)
    fewer.model.model = config.model.model
    for launch, low, high in (
        (Launch(8, "FSDP2", True), 35, 41),
        (Launch(8, "ZeRO-2", True), 38, 44),
    ):
        work = plans.longest(fewer, launch)
        assert low < memory.peak(estimate(fewer, policy, work, launch)) / 2**30 < high, launch
    _, policy = plans.load("geometry3k_lora")
    path = str(ROOT / "recipes/geometry3k_lora.yaml")
    fewer = load_config(["--config", path], sample_prompts=8)
    peak = memory.peak(estimate(fewer, policy, plans.longest(fewer, Launch()), Launch()))
    assert abs(peak / 2**30 - 13.0) < 0.3


@pytest.mark.parametrize(
    "start, size, launch, said",
    [
        ("python train_saei.py --model", "3B", Launch(), r"\((\d+) GiB by the plan"),
        ("python -m runtime.launch", "3B", Launch(8, "FSDP2", True), r"\(3B: (\d+) GiB per GPU"),
        ("python -m runtime.launch", "7B", Launch(8, "FSDP2", True), r"7B: (\d+) GiB\)"),
    ],
)
def test_the_readmes_figures_are_planned(start, size, launch, said, tmp_path):
    page = (ROOT / "README.md").read_text()
    text = re.search(rf"\n({start}(?:.*\\\n)+.*--steps.*)", page)[1].replace("\\\n", " ")
    words = text[text.index("--model") :].split()[2:]
    models.write(size, tmp_path)
    config = load_config(["--model", str(tmp_path), *words])
    policy = plan.load_policy(config)
    config.model.model = models.MODELS[size].hub
    work = plans.longest(config, launch)
    peak = memory.peak(estimate(config, policy, work, launch)) / 2**30
    assert int(re.search(said, page)[1]) == round(peak)

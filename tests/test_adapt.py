"""adapt.py and Policy.micro_responses: each knob leaves the gradients of what is still trained as they were."""

import json
import re

import pytest
import torch
from conftest import launch
from test_families import (
    KINDS,
    PICTURES,
    PROBLEMS,
    make_policy,
    relative,
    responses,
    settings,
    write_rows,
)
from transformers import AutoModelForImageTextToText

import train_saei
from vlm import adapt
from vlm.policy import Policy

TOLERANCE = 1e-5  # of a tensor's largest entry: float32 sums in another order
PROJECTOR = r"merger|connector|multi_modal_projector|image_newline"
LANGUAGE = r"language_model|text_model|lm_head"


@pytest.fixture(params=KINDS)
def policy(request):
    return make_policy(request.param)


def gradients(policy: Policy) -> tuple[list[torch.Tensor], dict[str, torch.Tensor], int]:
    """-> gradients of the pixels, of the trained parameters by name; numbers that were kept for the backward"""
    tokens, mask = responses(policy, 3, 4, 5)
    prompts = policy.encode(PROBLEMS, PICTURES)
    images = [x.clone().requires_grad_() for x in prompts.images]
    trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    kept = {}

    def pack(x):
        kept[x.data_ptr()] = x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        logprobs, entropy = policy.score(prompts.with_images(images), tokens, mask)
    loss = (logprobs.cos() + entropy.square())[mask].sum()
    grads = torch.autograd.grad(loss, [*images, *trained.values()], allow_unused=True)
    named = dict(zip(trained, grads[len(images) :], strict=True))
    return (
        list(grads[: len(images)]),
        {name: g for name, g in named.items() if g is not None},
        sum(kept.values()),
    )


def assert_gradients_equal(ours, theirs, names=None, tolerance=TOLERANCE) -> None:
    """Of the pixels, and of the named parameters, by default all."""
    names = theirs[1].keys() if names is None else names
    assert ours[1].keys() == set(names)
    assert relative(ours[0], theirs[0]) <= tolerance and all(g.any() for g in ours[0])
    assert (
        relative([ours[1][name] for name in names], [theirs[1][name] for name in names])
        <= tolerance
    )


@pytest.mark.parametrize("knobs", ["micro_responses", "checkpointing", "both"])
def test_recomputing_changes_no_gradient_and_keeps_less(policy, knobs):
    plain = gradients(policy)
    if knobs != "checkpointing":
        policy.micro_responses = 5  # of 12 rows: lots of 5, 5 and 2, across prompts
    if knobs != "micro_responses":
        adapt.checkpoint_layers(policy)
    ours = gradients(policy)
    assert_gradients_equal(ours, plain)
    assert ours[2] < {"micro_responses": 0.8, "checkpointing": 0.6, "both": 0.4}[knobs] * plain[2]


def test_the_attention_implementation_changes_no_gradient(policy):
    assert policy.model.config._attn_implementation == "sdpa"
    plain = gradients(policy)
    policy.model.set_attn_implementation("eager")
    assert policy.model.config._attn_implementation == "eager"
    assert_gradients_equal(
        gradients(policy), plain, tolerance=1e-4
    )  # its softmax is another algorithm


def test_no_phase_of_a_step_holds_more_than_its_share(tmp_path, reward_of_text, monkeypatch):
    """Prompts are sampled, attacked, measured and updated as few at a time as the settings say."""
    model, rows = small_run("qwen2_5_vl", tmp_path)
    seen, before = [], Policy.read
    monkeypatch.setattr(
        Policy, "read", lambda self, p, *x, **y: seen.append(len(p)) or before(self, p, *x, **y)
    )
    train(model, rows, tmp_path / "out", micro_prompts=1, sample_prompts=1, self_check=False)
    assert set(seen) == {1}


def test_a_lot_is_computed_again_and_no_more_than_that(monkeypatch):
    """Responses go through the language model in lots, each once forward and once more in the backward."""
    policy = make_policy("qwen2_5_vl")
    policy.micro_responses = 5
    seen, before = [], Policy.respond
    monkeypatch.setattr(
        Policy,
        "respond",
        lambda self, tokens, *x: seen.append(len(tokens)) or before(self, tokens, *x),
    )
    gradients(policy)
    assert sorted(seen) == [2, 2, 5, 5, 5, 5]


def test_sampling_is_the_same_with_checkpointed_layers(policy):
    prompts = policy.encode(PROBLEMS, PICTURES)
    want = policy.sample(prompts, 3, [1, 2, 3], 6)
    adapt.checkpoint_layers(policy)
    ours = policy.sample(prompts, 3, [1, 2, 3], 6)
    assert torch.equal(ours.tokens, want.tokens) and torch.equal(ours.entropy, want.entropy)


def test_checkpointed_layers_leave_dropout_off():
    torch.manual_seed(0)
    policy = make_policy("llava")
    for module in policy.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.9)
    adapt.checkpoint_layers(policy)
    assert_gradients_equal(gradients(policy), gradients(policy))
    assert torch.equal(gradients(policy)[0][0], gradients(policy)[0][0])


@pytest.mark.parametrize("what", ["none", "vision", "vision+projector"])
def test_freeze(policy, what):
    """The tower's or the projector's parameters get no gradient; all others, and the pixels, the one they had."""
    plain = gradients(policy)
    adapt.freeze(policy, what)
    trained = {"none": "", "vision": f"{PROJECTOR}|{LANGUAGE}", "vision+projector": LANGUAGE}[what]
    names = {name for name in plain[1] if re.search(trained, name)}
    assert_gradients_equal(gradients(policy), plain, names)
    if what == "vision":
        assert any(re.search(PROJECTOR, name) for name in names)
    assert what == "none" or not any(
        "layers.0" in name or "blocks.0" in name for name in names - language(names)
    )


def language(names: set[str]) -> set[str]:
    return {name for name in names if re.search(LANGUAGE, name)}


def test_lora_gradients_follow_from_those_of_the_merged_model(policy, tmp_path):
    """W + s B A: dL/dB = s dL/dW A^T, dL/dA = s B^T dL/dW, on every projection of the language model and nothing else;
    pixels as of the merged model."""
    kind = policy.model.config.model_type
    adapt.add_lora(policy, rank=3, seed=0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    ours = gradients(policy)
    assert len(ours[1]) == 2 * 2 * 7 and all(
        re.search(r"(language_model|text_model)\.layers", name) for name in ours[1]
    )
    policy.save_pretrained(tmp_path)
    merged = Policy.from_pretrained(tmp_path)
    theirs = gradients(merged)
    assert type(merged.model) is type(make_policy(kind).model) and not any(
        "lora" in name for name in theirs[1]
    )
    assert relative(ours[0], theirs[0]) <= 1e-4
    weights, want = dict(policy.named_parameters()), {}
    for name in ours[1]:
        stem = name.split(".lora_")[0]
        a, b = (weights[f"{stem}.lora_{x}.default.weight"] for x in "AB")
        whole = 2.0 * theirs[1][f"{stem}.weight"]
        want[name] = (whole @ a.T if "lora_B" in name else b.T @ whole).detach()
    assert relative([ours[1][name] for name in want], list(want.values())) <= 1e-4


def test_the_attack_moves_the_same_pixels_with_lora():
    policy = make_policy("smolvlm")
    plain = gradients(policy)[0]
    adapt.add_lora(policy, rank=2, seed=0)  # B = 0: the same policy
    with train_saei.frozen(policy):
        assert relative(gradients(policy)[0], plain) <= TOLERANCE
    assert sum(p.requires_grad for p in policy.parameters()) == 28


def test_adapters_of_a_bfloat16_model_are_float32(tmp_path):
    policy = make_policy("internvl")
    policy.model.to(torch.bfloat16)
    adapt.add_lora(policy, rank=2, seed=0)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert all(g.isfinite().all() and g.any() for g in gradients(policy)[0])
    policy.save_pretrained(tmp_path)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    before = make_policy("internvl").model.to(torch.bfloat16).state_dict()
    assert all(
        torch.equal(saved[name], w) and saved[name].dtype == w.dtype for name, w in before.items()
    )


def test_adapters_of_another_model_are_refused(tmp_path):
    policy = make_policy("internvl")
    adapt.add_lora(policy, rank=2, seed=0)
    policy.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="does not hold the adapters of this model"):
        adapt.add_lora(make_policy("smolvlm"), 2, 0, tmp_path)


def test_lora_without_peft_names_the_cure(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        adapt.add_lora(make_policy("llava"), 2, 0)


# ----------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def reward_of_text(monkeypatch):
    """Random policies earn nothing: a reward that depends on the text alone."""
    rewards = lambda completions, **_: [len(text) % 7 / 7 for text in completions]  # noqa: E731
    monkeypatch.setattr(train_saei.rewards, "format_reward", rewards)


def train(model, rows, out, **changes) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """-> metrics, the last checkpoint's parameters"""
    train_saei.main(train_saei.load_config(settings(model, rows, out, **changes)))
    metrics = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    last = AutoModelForImageTextToText.from_pretrained(
        max((out / "checkpoints").glob("step-*"))
    ).state_dict()
    drop = ("seconds", "memory")
    return [{k: v for k, v in m.items() if not k.startswith(drop)} for m in metrics], last


def small_run(kind: str, tmp_path):
    make_policy(kind).save_pretrained(tmp_path / "model")
    return tmp_path / "model", write_rows(tmp_path, list(zip(PROBLEMS, PICTURES, strict=True)))


def test_the_configuration_reaches_the_policy(tmp_path, reward_of_text, monkeypatch):
    model, rows = small_run("qwen2_5_vl", tmp_path)
    seen = []
    monkeypatch.setattr(Policy, "self_check", lambda self: seen.append(self) or {})
    knobs = dict(
        micro_responses=7,
        checkpointing=True,
        min_pixels=16 * 16,
        max_pixels=32 * 32,
        freeze="vision",
    )
    train(model, rows, tmp_path / "out", **knobs)
    (policy,) = seen
    assert (
        policy.micro_responses == 7
        and policy.model.model.language_model.layers[1]._can_checkpoint_with_cache
    )
    size = Policy.from_pretrained(
        tmp_path / "out/checkpoints/step-000001"
    ).processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (16 * 16, 32 * 32)


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3"])
def test_a_run_with_all_recomputing_is_the_run_without(kind, tmp_path, reward_of_text):
    model, rows = small_run(kind, tmp_path)
    plain = train(model, rows, tmp_path / "plain", freeze="vision")
    ours = train(
        model, rows, tmp_path / "ours", freeze="vision", checkpointing=True, micro_responses=2
    )
    assert plain[0][0]["grad_norm"] > 0 and ours[0][0] == pytest.approx(
        plain[0][0], rel=1e-4, abs=1e-5
    )
    before = AutoModelForImageTextToText.from_pretrained(model).state_dict()
    for name, w in before.items():
        frozen = bool(re.search(r"visual\.(?!.*merger)|vision_tower", name))
        assert frozen == torch.equal(w, plain[1][name]) == torch.equal(w, ours[1][name]), name


def test_a_lora_run_resumes_exactly_and_its_checkpoint_is_a_plain_model(tmp_path, reward_of_text):
    model, rows = small_run("smolvlm", tmp_path)
    lora = dict(lora_rank=2, lr=1e-2)
    whole = train(model, rows, tmp_path / "whole", steps=3, **lora)
    train(model, rows, tmp_path / "parts", steps=2, **lora)
    parts = train(model, rows, tmp_path / "parts", steps=3, resume=True, self_check=False, **lora)
    assert parts[0] == whole[0] and all(
        torch.equal(w, parts[1][name]) for name, w in whole[1].items()
    )
    before = AutoModelForImageTextToText.from_pretrained(model).state_dict()
    assert before.keys() == whole[1].keys()
    for name, w in before.items():
        if re.fullmatch(adapt.LORA_TARGETS + r"\.weight", name):
            assert torch.linalg.matrix_rank(whole[1][name] - w, tol=1e-4) in (1, 2), name
        else:
            assert torch.equal(w, whole[1][name]), name


def test_two_processes_with_text_alone_on_one(tmp_path, reward_of_text):
    """First one process has a picture and the other none, then neither; LLaVA's tower has weights that never get a
    gradient. Parameters as of one process (apart from AdamW's division by tiny gradients)."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, sys; sys.path.insert(0, os.getcwd())\nimport train_saei\n"
        "train_saei.rewards.format_reward = lambda completions, **_: [len(text) % 7 / 7 for text in completions]\n"
        "train_saei.main(train_saei.load_config(sys.argv[1:]))\n"
    )
    policy = make_policy("llava")
    policy.save_pretrained(tmp_path / "model")
    rows = [(f"{PROBLEMS[2]} {i}", []) for i in range(4)]
    rows[train_saei.epoch_order(0, 0, 4)[0]] = (PROBLEMS[1], PICTURES[1])
    rows = write_rows(tmp_path, rows)
    knobs = dict(prompts_per_step=4, micro_prompts=1, checkpointing=True, micro_responses=3)
    _, one = train(tmp_path / "model", rows, tmp_path / "1", **knobs)
    launch(2, str(script), *settings(tmp_path / "model", rows, tmp_path / "2", **knobs))
    two = AutoModelForImageTextToText.from_pretrained(
        tmp_path / "2/checkpoints/step-000001"
    ).state_dict()
    before = policy.model.state_dict()
    for part in ("vision_tower.", "multi_modal_projector.", "language_model."):
        flat = lambda a, b: torch.cat([(a[k] - b[k]).flatten() for k in before if part in k])  # noqa: B023, E731
        moved, apart = flat(one, before), flat(one, two)
        assert moved.norm() > 1e-3 and apart.norm() < 1e-2 * moved.norm(), part

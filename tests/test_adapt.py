"""adapt.py and Policy.micro_responses: the gradients of what is still trained stay as they were."""

import functools
import re

import pytest
import torch
from conftest import launch
from torch import Tensor
from transformers import AutoModelForImageTextToText

from runtime import data
from runtime.args import MemoryArgs
from tests.families import (
    KINDS,
    PICTURES,
    PROBLEMS,
    checkpoint,
    make_policy,
    relative,
    responses,
    shared_policy,
)
from tests.short_run import arguments, last_weights, train, write_rows
from vlm import adapt
from vlm.policy import Policy

TOLERANCE = 1e-5  # of a tensor's largest entry: float32 sums in another order
DEEP = {"gemma3n": 4e-5}  # the same in a tower of 84 blocks
PROJECTOR = (
    r"(?<!vit_)merger|downsample|connector|multi_modal_projector|mm_projector|image_newline"
    r"|visual_embeddings_table|embed_vision"
)
LANGUAGE = r"language_model|text_model|lm_head"
# Linear layers in the language model's layers, where they are not two times seven: three layers of
# linear attention with five, one of attention with four, and an MLP or a shared expert with three.
ADAPTED = {"qwen3_5": 31, "qwen3_5_moe": 31, "qwen3_vl_moe": 2 * 4}
# Gemma 4: two layers read others' keys and values, and each has two more, for its own embeddings.
ADAPTED |= {"gemma4": 4 * 7 - 2 * 2 + 4 * 2, "gemma4_unified": 4 * 7}
# Gemma 3n: the same, and each has five more, of its streams and low-rank residual.
ADAPTED |= {"gemma3n": 4 * 14 - 2 * 2}
ADAPTED |= {"glm4v": 2 * 6, "glm46v": 2 * 6}  # gate and up are one
ADAPTED |= {"kimi_k25": 2 * 8}  # attention of low rank: five
ADAPTED |= {"minicpmv4_6": 5 + 4 + 2 * 3, "minicpmv4_7": 5 + 4 + 2 * 3}
ADAPTED |= {"lfm2_vl": 2 * 2 + 2 * 4 + 4 * 3, "lfm3_vl": 2 * 2 + 2 * 5 + 4 * 3}  # two convolutions


@pytest.fixture(params=KINDS)
def policy(request):
    return make_policy(request.param)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    pairs = list(zip(PROBLEMS, PICTURES, strict=True))
    return write_rows(tmp_path_factory.mktemp("rows"), pairs)


def gradients(policy: Policy) -> tuple[list[Tensor], dict[str, Tensor], int]:
    """-> of the pixels; of the trained parameters, by name; numbers kept for the backward"""
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
    named = {}
    for name, grad in zip(trained, grads[len(images) :], strict=True):
        if grad is not None:
            named[name] = grad
    return list(grads[: len(images)]), named, sum(kept.values())


@functools.cache
def gradients_of(kind: str):
    return gradients(shared_policy(kind))


def plain_gradients(policy: Policy):
    """Those of the policy before a test changed it."""
    return gradients_of(policy.model.config.model_type)


def assert_gradients_equal(ours, theirs, names=None, tolerance=TOLERANCE) -> None:
    """Of the pixels, and of the named parameters, by default all."""
    names = theirs[1].keys() if names is None else names
    assert ours[1].keys() == set(names) and all(grad.any() for grad in ours[0])
    assert relative(ours[0], theirs[0]) <= tolerance
    assert relative([ours[1][x] for x in names], [theirs[1][x] for x in names]) <= tolerance


# ------------------------------------------------------------------------------- computed again


@pytest.mark.parametrize("micro, layers, share", [(5, False, 0.85), (0, True, 0.6), (5, True, 0.4)])
def test_recomputing_changes_no_gradient_and_keeps_less(policy, micro, layers, share):
    policy.micro_responses = micro  # of 12 rows: chunks of 5, 5 and 2, across prompts
    if layers:
        adapt.checkpoint_layers(policy)
    ours, plain = gradients(policy), plain_gradients(policy)
    tolerance = DEEP.get(policy.model.config.model_type, TOLERANCE)
    assert_gradients_equal(ours, plain, tolerance=tolerance)
    if policy.model.config.model_type == "gemma3n" and not layers:
        share = 0.95  # most of what it keeps is the tower's
    assert ours[2] < share * plain[2]


def test_the_attention_implementation_changes_no_gradient(policy):
    assert policy.model.config._attn_implementation == "sdpa"
    policy.model.set_attn_implementation("eager")
    assert policy.model.config._attn_implementation == "eager"
    # its softmax is another algorithm
    assert_gradients_equal(gradients(policy), plain_gradients(policy), tolerance=1e-4)


def test_a_chunk_of_responses_is_computed_again_and_no_more_than_that(monkeypatch):
    """Each chunk goes through the language model once, and once more in the backward."""
    policy, respond, seen = make_policy("qwen2_5_vl"), Policy.respond, []
    policy.micro_responses = 5

    def counted(self, tokens, *args):
        seen.append(len(tokens))
        return respond(self, tokens, *args)

    monkeypatch.setattr(Policy, "respond", counted)
    gradients(policy)
    assert sorted(seen) == [2, 2, 5, 5, 5, 5]


def test_sampling_is_the_same_with_checkpointed_layers(policy):
    prompts = policy.encode(PROBLEMS, PICTURES)
    want = policy.sample(prompts, 3, [1, 2, 3], 6)
    adapt.checkpoint_layers(policy)
    ours = policy.sample(prompts, 3, [1, 2, 3], 6)
    assert torch.equal(ours.tokens, want.tokens) and torch.equal(ours.entropy, want.entropy)


def test_checkpointed_layers_leave_dropout_off():
    policy = make_policy("llava")
    for module in policy.modules():
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.9)
    adapt.checkpoint_layers(policy)
    assert_gradients_equal(gradients(policy), gradients_of("llava"))


# ---------------------------------------------------------------------------- frozen parts, LoRA


@pytest.mark.parametrize("what", ["none", "vision", "vision+projector"])
def test_freeze(policy, what):
    """Frozen parameters get no gradient. All others, and the pixels, get the one they had."""
    plain = plain_gradients(policy)
    adapt.freeze(policy, what)
    trained = {"none": "", "vision": f"{PROJECTOR}|{LANGUAGE}", "vision+projector": LANGUAGE}[what]
    names = {name for name in plain[1] if re.search(trained, name)}
    tolerance = DEEP.get(policy.model.config.model_type, TOLERANCE)
    assert_gradients_equal(gradients(policy), plain, names, tolerance)
    of_vision = {name for name in names if not re.search(LANGUAGE, name)}
    assert bool(of_vision) == (what != "vision+projector")
    if what == "vision":
        assert not any(re.search(r"layers\.0|blocks\.0", name) for name in of_vision)


def test_lora_gradients_follow_from_those_of_the_merged_model(policy, tmp_path):
    """W + 2 B A: dL/dB = 2 dL/dW A^T, dL/dA = 2 B^T dL/dW, on every linear layer of the language
    model's layers and nothing else. Pixels as of the merged model."""
    adapt.add_lora(policy, rank=3, seed=0)
    weights = {name: p for name, p in policy.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, p in weights.items():
            if "lora_B" in name:
                p.normal_(std=0.05)
    ours = gradients(policy)
    adapted = ADAPTED.get(policy.model.config.model_type, 2 * 7)
    assert len(ours[1]) == 2 * adapted  # A and B
    assert all(re.search(r"(language_model|text_model)\.layers", name) for name in ours[1])
    policy.save_pretrained(tmp_path)
    merged = Policy.from_pretrained(tmp_path)
    assert type(merged.model) is type(policy.model) and not merged.lora_rank
    theirs = gradients(merged)
    assert relative(ours[0], theirs[0]) <= 1e-4
    want = []
    for name in ours[1]:
        stem = name.split(".lora_")[0]
        a, b = (weights[f"{stem}.lora_{x}.default.weight"].detach() for x in "AB")
        whole = 2.0 * theirs[1][f"{stem}.weight"]
        want.append(whole @ a.T if "lora_B" in name else b.T @ whole)
    assert relative(list(ours[1].values()), want) <= 1e-4


def test_new_adapters_change_nothing_and_pass_the_attack_s_gradient():
    policy = make_policy("smolvlm")
    adapt.add_lora(policy, rank=2, seed=0)  # B = 0: the same policy
    assert sum(p.requires_grad for p in policy.parameters()) == 28
    policy.requires_grad_(False)
    assert relative(gradients(policy)[0], gradients_of("smolvlm")[0]) <= TOLERANCE


def test_adapters_of_a_bfloat16_model_are_float32(tmp_path):
    policy = make_policy("internvl").to(torch.bfloat16)
    before = policy.model.state_dict()
    adapt.add_lora(policy, rank=2, seed=0)
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    assert all(grad.isfinite().all() and grad.any() for grad in gradients(policy)[0])
    policy.save_pretrained(tmp_path)
    saved = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
    for name, w in before.items():
        assert torch.equal(saved[name], w) and saved[name].dtype == w.dtype


def test_saved_adapters_are_loaded_and_those_of_another_model_refused(policy, tmp_path):
    """Saved from a gathered state dict, which holds other values than the policy."""
    kind = policy.model.config.model_type
    other = "llava" if kind in ("smolvlm", "idefics3") else "smolvlm"
    adapt.add_lora(policy, rank=2, seed=0)
    gathered = {name: w + 1 for name, w in policy.state_dict().items()}
    policy.save_pretrained(tmp_path, gathered)
    again = make_policy(kind)
    adapt.add_lora(again, 2, 1, tmp_path)
    for name, p in again.named_parameters():
        assert torch.equal(p, gathered[name]) == p.requires_grad, name
    with pytest.raises(ValueError, match="does not hold the adapters of this model"):
        adapt.add_lora(make_policy(other), 2, 0, tmp_path)


def test_fused_experts_have_no_adapters_and_are_named(capsys):
    policy = make_policy("qwen3_5_moe")
    MemoryArgs(lora_rank=2).apply(policy, seed=0)
    line = "fused experts, which stay frozen: mlp.experts.down_proj, mlp.experts.gate_up_proj\n"
    assert line in capsys.readouterr().out
    adapted = {name.split(".lora_")[0] for name, p in policy.named_parameters() if p.requires_grad}
    assert not any(name.endswith(("experts", "gate", "shared_expert_gate")) for name in adapted)
    MemoryArgs(lora_rank=2).apply(make_policy("qwen3_5"), seed=0)
    assert capsys.readouterr().out == ""


def test_lora_without_peft_names_the_cure(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peft", None)
    with pytest.raises(ImportError, match="pip install peft"):
        adapt.add_lora(make_policy("llava"), 2, 0)


# -------------------------------------------------------------------------------------- whole runs


def test_no_phase_of_a_step_holds_more_than_its_share(rows, tmp_path, monkeypatch):
    """Prompts are sampled, attacked, measured and updated as few at a time as the settings say."""
    read, seen = Policy.read, set()

    def counted(self, prompts):
        seen.add(len(prompts))
        return read(self, prompts)

    monkeypatch.setattr(Policy, "read", counted)
    few = dict(micro_prompts=1, sample_prompts=1, self_check=False)
    train(checkpoint("qwen2_5_vl"), rows, tmp_path, **few)
    assert seen == {1}


def test_the_configuration_reaches_the_policy(rows, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Policy, "self_check", lambda self: seen.append(self) or {})
    knobs = dict(micro_responses=7, gradient_checkpointing=True, freeze="vision")
    knobs |= dict(min_pixels=16 * 16, max_pixels=32 * 32)
    train(checkpoint("qwen2_5_vl"), rows, tmp_path, **knobs)
    (policy,) = seen
    assert policy.micro_responses == 7
    assert policy.model.model.language_model.layers[1].gradient_checkpointing
    saved = Policy.from_pretrained(tmp_path / "checkpoints/step-000001")
    size = saved.processor.image_processor.size
    assert (size["shortest_edge"], size["longest_edge"]) == (16 * 16, 32 * 32)


@pytest.mark.parametrize("kind", ["qwen3_vl", "gemma3"])
def test_a_run_with_all_recomputing_is_the_run_without(kind, rows, tmp_path):
    model = checkpoint(kind)
    plain = train(model, rows, tmp_path / "plain", freeze="vision")
    knobs = dict(freeze="vision", gradient_checkpointing=True, micro_responses=2)
    ours = train(model, rows, tmp_path / "ours", **knobs)
    assert plain[0][0]["grad_norm"] > 0
    assert ours[0][0] == pytest.approx(plain[0][0], rel=1e-4, abs=1e-5)
    for name, w in shared_policy(kind).model.state_dict().items():
        frozen = bool(re.search(r"visual\.(?!.*merger)|vision_tower", name))
        assert frozen == torch.equal(w, plain[1][name]) == torch.equal(w, ours[1][name]), name


def test_a_lora_run_resumes_exactly_and_its_checkpoint_is_a_plain_model(rows, tmp_path):
    model, lora = checkpoint("smolvlm"), dict(lora_rank=2, lr=1e-2)
    whole = train(model, rows, tmp_path / "whole", steps=3, **lora)
    train(model, rows, tmp_path / "parts", steps=2, **lora)
    parts = train(model, rows, tmp_path / "parts", steps=3, resume=True, self_check=False, **lora)
    assert parts[0] == whole[0]
    before = shared_policy("smolvlm").model.state_dict()
    assert before.keys() == whole[1].keys()
    for name, w in whole[1].items():
        assert torch.equal(w, parts[1][name])
        if re.search(r"text_model\.layers\.\d+\.\w+\.\w_proj\.weight|gate|up|down_proj", name):
            assert torch.linalg.matrix_rank(w - before[name], tol=1e-4) in (1, 2), name
        else:
            assert torch.equal(w, before[name]), name


def test_two_processes_with_text_alone_on_one(tmp_path):
    """First one process has a picture and the other none, then neither. LLaVA's tower has weights
    that never get a gradient. Parameters as of one process, apart from AdamW's division by tiny
    gradients."""
    model = checkpoint("llava")
    pairs = [(f"{PROBLEMS[2]} {i}", []) for i in range(4)]
    pairs[data.epoch_order(0, 0, 4)[0]] = (PROBLEMS[1], PICTURES[1])
    rows = write_rows(tmp_path, pairs)
    knobs = dict(
        prompts_per_step=4, micro_prompts=1, gradient_checkpointing=True, micro_responses=3
    )
    _, one = train(model, rows, tmp_path / "1", **knobs)
    launch(2, "-m", "tests.short_run", *arguments(model, rows, tmp_path / "2", **knobs))
    two, before = last_weights(tmp_path / "2"), shared_policy("llava").model.state_dict()
    for part in ("vision_tower.", "multi_modal_projector.", "language_model."):
        names = [name for name in before if part in name]
        moved = torch.cat([(one[name] - before[name]).flatten() for name in names])
        apart = torch.cat([(one[name] - two[name]).flatten() for name in names])
        assert moved.norm() > 1e-3 and apart.norm() < 1e-2 * moved.norm(), part

"""vlm/precision.py: under autocast each weight is cast once, values and checkpoints as before."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType
from conftest import assert_same_run, finish, reward_half, short, start
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText

import rewards
import train_saei
from runtime import distributed
from tests import fake_flash, families
from vlm import adapt
from vlm.policy import Policy
from vlm.precision import cast_once, keep_frozen_in_bfloat16, product_weights

AROUND = 5  # weights and biases of patch embedding and merger, cast in each pass over the prompts


class Casts(TorchDispatchMode):
    """How often parameters are cast to bfloat16."""

    def __init__(self, policy):
        super().__init__()
        self.storages = {p.untyped_storage()._cdata for p in policy.parameters()}
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default:
            to_bfloat16 = (kwargs or {}).get("dtype") == torch.bfloat16
            self.count += to_bfloat16 and args[0].untyped_storage()._cdata in self.storages
        return func(*args, **(kwargs or {}))


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def rounded(policy: Policy) -> Policy:
    """With weights that bfloat16 holds, as published ones."""
    for p in policy.parameters():
        p.data = p.data.bfloat16().float()
    return policy


def attacked(policy: Policy) -> list[torch.Tensor]:
    """Log-probs, entropies and pixel gradients of random responses, two of them at a time."""
    policy.micro_responses = 2
    tokens, mask = families.responses(policy, 3, 2, 5)
    prompts = policy.encode(families.PROBLEMS, families.PICTURES)
    images = [x.clone().requires_grad_() for x in prompts.images]
    stats = torch.stack(policy.score(prompts.with_images(images), tokens, mask))
    grads = torch.autograd.grad(stats[:, mask].square().sum(), images)
    return [stats[:, mask].detach(), *grads]


def assert_equal(ours: list[torch.Tensor], theirs: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("kind", families.KINDS)
def test_values_are_those_of_autocast(kind):
    """Bit for bit: in the attack, and with frozen weights in bfloat16."""
    policy = rounded(families.make_policy(kind))
    policy.requires_grad_(False)
    with autocast():
        want = attacked(policy)
        with cast_once(policy.model, "cpu"):
            assert_equal(attacked(policy), want)
        assert keep_frozen_in_bfloat16(policy.model)
        assert_equal(attacked(policy), want)


def test_the_attack_casts_each_weight_once():
    policy = families.make_policy("qwen2_5_vl")
    adapt.checkpoint_layers(policy)
    weights = product_weights(policy.model)
    with autocast(), Casts(policy) as casts, distributed.frozen(policy):
        attacked(policy)
    assert len(weights) > 20 and casts.count == len(weights) + AROUND
    policy.requires_grad_(False)
    with autocast(), Casts(policy) as casts:
        attacked(policy)
    assert casts.count > 3 * len(weights)  # as it would be


def test_outside_all_is_as_before():
    """The same parameter objects: DDP has hooks on them. Without autocast nothing is cast."""
    policy = families.make_policy("qwen2_5_vl")
    before = dict(policy.named_parameters())
    policy.model.lm_head.weight.requires_grad_(False)
    with autocast(), pytest.raises(KeyError), distributed.frozen(policy):
        assert policy.model.lm_head.weight.dtype == torch.bfloat16
        assert not any(p.requires_grad for p in policy.parameters())
        raise KeyError
    after = dict(policy.named_parameters())
    assert before.keys() == after.keys() and all(after[name] is p for name, p in before.items())
    asking = [name for name, p in after.items() if not p.requires_grad]
    assert asking == ["model.lm_head.weight"]
    with distributed.frozen(policy):
        assert policy.model.lm_head.weight is before["model.lm_head.weight"]


def test_frozen_weights_are_cast_in_no_forward():
    """LoRA's base in float32."""
    policy = rounded(families.make_policy("qwen2_5_vl"))
    adapt.add_lora(policy, rank=2, seed=0)
    policy.keep_frozen_in_bfloat16()
    adapters = [p for p in policy.parameters() if p.requires_grad]
    prompts = policy.encode(families.PROBLEMS, families.PICTURES)
    with autocast(), Casts(policy) as casts:
        policy.sample(prompts, 2, [1, 2, 3], 6)
    assert casts.count == len(adapters) + AROUND  # autocast remembers the adapters' casts


def test_a_weight_that_bfloat16_does_not_hold_stays():
    policy = rounded(families.make_policy("qwen2_5_vl"))
    policy.requires_grad_(False)
    layer = policy.language_layers()[1].mlp.up_proj
    layer.weight.data[0, 0] = 1.001
    policy.keep_frozen_in_bfloat16()
    assert layer.weight.dtype == torch.float32
    assert policy.language_layers()[0].mlp.up_proj.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("lora", [False, True])
def test_checkpoints_hold_what_was_loaded(tmp_path, lora):
    """In float32, as the trained weights."""
    policy = rounded(families.make_policy("qwen2_5_vl"))
    want = {name: w.clone() for name, w in policy.model.state_dict().items()}
    if lora:
        adapt.add_lora(policy, rank=2, seed=0)
    else:
        adapt.freeze(policy, "vision")
    policy.keep_frozen_in_bfloat16()
    assert any(p.dtype == torch.bfloat16 for p in policy.parameters())
    for state in (None, policy.state_dict()):
        policy.save_pretrained(tmp_path, state)
        stored = load_file(tmp_path / "model.safetensors").values()
        assert {w.dtype for w in stored} == {torch.float32}
        saved = AutoModelForImageTextToText.from_pretrained(tmp_path).state_dict()
        assert saved.keys() == want.keys()
        assert all(torch.equal(saved[name], w) for name, w in want.items())


def lora_runs(model: str, folder) -> None:
    """Four steps at once, and in two halves."""
    rewards.accuracy_reward = reward_half
    options = dict(lora_rank=2, condition="sampled", save_every=2)
    train_saei.main(short(model, folder / "whole", steps=4, **options))
    for steps, resume in ((2, False), (4, True)):
        train_saei.main(short(model, folder / "parts", steps=steps, resume=resume, **options))


def test_a_run_is_resumed_exactly(tmp_path, monkeypatch):
    policy = rounded(families.make_policy("qwen2_5_vl"))
    policy.save_pretrained(tmp_path / "model")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    finish(start(1, lora_runs, str(tmp_path / "model"), tmp_path))
    assert_same_run(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize(
    "kind, precision, dtypes",
    [
        ("DEEPSPEED", "bf16", {torch.bfloat16}),  # autocast is off, flash attention needs it
        ("DEEPSPEED", "no", {torch.float32}),
        ("MULTI_GPU", "bf16", {torch.float32, torch.bfloat16}),
        ("FSDP", "bf16", {torch.float32, torch.bfloat16}),
        ("NO", "no", {torch.float32}),
    ],
)
def test_the_reference_has_the_dtype_that_is_computed_in(kind, precision, dtypes):
    reference = rounded(families.make_policy("qwen2_5_vl"))
    launcher = dict(distributed_type=DistributedType(kind), device=torch.device("cpu"))
    accelerator = SimpleNamespace(mixed_precision=precision, **launcher)
    distributed.place_reference(accelerator, reference)
    assert {p.dtype for p in reference.parameters()} == dtypes
    assert not any(p.requires_grad for p in reference.parameters())
    buffers = dict(reference.named_buffers())
    rotations = [x for name, x in buffers.items() if name.endswith("inv_freq")]
    assert rotations and {x.dtype for x in rotations} == {torch.float32}
    if kind == "DEEPSPEED":
        fake_flash.use(reference.model)
        with fake_flash.installed() as calls:
            attacked(reference)
        assert calls.keys() == {"varlen"} | dtypes

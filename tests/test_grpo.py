"""grpo.py: advantages, log-probs, loss and k3 against TRL's own code and against plain loops.

Tests named test_trap_NN guard against a failure seen in other projects.
"""

import statistics
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd, selective_log_softmax

from grpo import equal_groups, group_advantages, kl_k3, policy_loss, token_logprobs

TIGHT = {"atol": 1e-6, "rtol": 1e-5}  # float32 rounding


def batch(
    rows: int = 6, length: int = 7, spread: float = 0.4, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Arguments of policy_loss: ragged, one row empty, ratios on both sides of both clips for both signs of A."""
    generator = torch.Generator().manual_seed(seed)
    old = -torch.rand(rows, length, generator=generator) * 3
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator).index_fill(
        0, torch.tensor([rows - 1]), 0
    )
    return {
        "logprobs": old + spread * torch.randn(rows, length, generator=generator),
        "old_logprobs": old,
        "advantages": torch.randn(rows, generator=generator),
        "mask": torch.arange(length) < lengths,
    }


def loss_metrics_gradient(**arguments):
    logprobs = arguments.pop("logprobs").clone().requires_grad_()
    loss, metrics = policy_loss(logprobs, **arguments)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), metrics, gradient


# ----------------------------------------------------------------------------------------------------- group_advantages


def test_advantages_by_hand():
    """Rewards 1, 0, 0, 0: mean 1/4, variance (9 + 3) / 16 / 3 = 1/4, so (3/4) / (1/2) and -(1/4) / (1/2)."""
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 2.0, 4.0]]))
    a = 3**0.5 / 2
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [-a, a, -a, a]])
    torch.testing.assert_close(advantages, expected, atol=5e-6, rtol=0)


def test_advantages_without_scale_are_the_centred_rewards():
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [5.0, 3.0, 4.0, 4.0]])
    expected = [[0.75, -0.25, -0.25, -0.25], [1.0, -1.0, 0.0, 0.0]]
    assert group_advantages(rewards, scale="none").tolist() == expected


reward_groups = st.integers(2, 9).flatmap(
    lambda g: st.lists(
        st.lists(st.sampled_from([0.0, 0.1, 0.9, 1.0, -2.5]), min_size=g, max_size=g),
        min_size=1,
        max_size=4,
    )
)


@settings(max_examples=100, deadline=None)
@given(reward_groups, st.sampled_from([1e-6, 1e-4, 0.5]), st.sampled_from(["std", "none"]))
def test_advantages_equal_python_and_trl(groups, eps, scale):
    """statistics.stdev divides by G - 1; TRL's own nanstd too."""
    rewards = torch.tensor(groups, dtype=torch.float64)
    advantages = group_advantages(rewards, eps, scale)
    expected = [
        [
            (r - statistics.fmean(g)) / (statistics.stdev(g) + eps if scale == "std" else 1.0)
            for r in g
        ]
        for g in groups
    ]
    torch.testing.assert_close(
        advantages, torch.tensor(expected, dtype=torch.float64), atol=1e-9, rtol=1e-9
    )
    if scale == "std":
        trl = (rewards - rewards.nanmean(1, keepdim=True)) / (
            nanstd(rewards, dim=1, keepdim=True) + eps
        )
        torch.testing.assert_close(
            advantages, trl, atol=1e-6, rtol=1e-6
        )  # its G / (G - 1) is a float32


@settings(max_examples=50, deadline=None)
@given(reward_groups)
def test_advantages_of_a_group_sum_to_zero_and_forget_shift_and_scale(groups):
    rewards = torch.tensor(groups, dtype=torch.float64)
    advantages = group_advantages(rewards)
    assert advantages.shape == rewards.shape and advantages.sum(dim=1).abs().max() < 1e-9
    torch.testing.assert_close(group_advantages(10 * rewards + 3), advantages, atol=1e-4, rtol=1e-4)
    if len(groups) > 1:  # each group on its own
        torch.testing.assert_close(group_advantages(rewards[1:]), advantages[1:])


@pytest.mark.parametrize(
    ("rewards", "message"),
    [
        (torch.ones(4), r"\(P, G\) with G >= 2, got \(4,\)"),
        (torch.ones(4, 1), r"got \(4, 1\)"),
        (torch.ones(2, 2, 2), r"got \(2, 2, 2\)"),
        (torch.tensor([[1.0, 0.0], [1.0, torch.nan]]), "not finite in group 1"),
        (torch.tensor([[torch.inf, 0.0], [1.0, 1.0]]), "not finite in group 0"),
    ],
)
def test_group_advantages_refuses(rewards, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(rewards)


def test_group_advantages_refuses_an_unknown_scale():
    with pytest.raises(ValueError, match="'std' or 'none', got 'batch'"):
        group_advantages(torch.eye(2), scale="batch")


def test_trap_12_zero_variance_is_that_of_the_accuracy():
    """All wrong, all well-formatted: its mean is not 0. One badly formatted: its rewards differ. Both are idle."""
    accuracy = torch.tensor(
        [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, 1.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
    )
    formats = torch.tensor(
        [[1.0, 1.0, 1.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 1.0], [0.0, 0.0, 0.0]]
    )
    rewards = 0.9 * accuracy + 0.1 * formats
    assert equal_groups(accuracy).tolist() == [True, True, True, False, False]
    assert (rewards.mean(dim=1)[:2] > 0).all() and not equal_groups(rewards)[
        1
    ]  # what other filters look at


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("reward", [1.1, 0.1, 0.9, 1 / 3, 1e4, -7.7])
def test_trap_13_equal_rewards_get_exactly_zero(reward, scale):
    """15 rewards of 1.1: their float32 mean is not 1.1, and the difference is divided by itself."""
    for g in range(2, 33):
        rewards = torch.full((2, g), reward)
        rewards[1, 0] += 1.0  # the rule is for each group on its own
        advantages = group_advantages(rewards, scale=scale)
        assert (advantages[0] == 0).all() and advantages[1, 0] > 0
    naive = torch.full((15,), 1.1)
    naive = (naive - naive.mean()) / (naive.std(correction=1) + 1e-6)
    assert naive.abs().max() > 0.05


def test_trap_14_std_divides_by_g_minus_one():
    """The winner of four gets 1.50; dividing by G it would get 1.73."""
    assert group_advantages(torch.tensor([[0.0, 0.0, 1.0, 0.0]]))[0, 2].item() == pytest.approx(
        1.5, abs=1e-4
    )


# ------------------------------------------------------------------------------------------------------- token_logprobs


def logits_and_tokens(n: int = 4, t: int = 5, v: int = 60) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return 3 * torch.randn(n, t, v, generator=generator), torch.randint(
        0, v, (n, t), generator=generator
    )


def test_logprobs_by_hand():
    """Odds 1 : 3, and at temperature 1/2 their squares, 1 : 9."""
    logits, tokens = torch.tensor([[[0.0, 3.0], [0.0, 3.0]]]).log(), torch.tensor([[1, 0]])
    logits[..., 0] = 0.0
    expected = torch.tensor([[0.75, 0.25]]).log()
    torch.testing.assert_close(token_logprobs(logits, tokens), expected)
    torch.testing.assert_close(
        token_logprobs(logits, tokens, 0.5), torch.tensor([[0.9, 0.1]]).log()
    )


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_and_gradient_equal_trl_and_torch_distributions(temperature):
    logits, tokens = logits_and_tokens()
    weights = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))

    def value_and_gradient(function, dtype=torch.float32):
        x = logits.to(dtype).requires_grad_()
        value = function(x)
        return value.detach().float(), torch.autograd.grad((value * weights).sum(), x)[0].float()

    ours = value_and_gradient(lambda x: token_logprobs(x, tokens, temperature))
    trl = value_and_gradient(lambda x: selective_log_softmax(x, tokens, temperature))
    exact = value_and_gradient(
        lambda x: Categorical(logits=x / temperature).log_prob(tokens), torch.float64
    )
    torch.testing.assert_close(ours, trl, **TIGHT)
    torch.testing.assert_close(ours, exact, **TIGHT)


def test_logprobs_of_bfloat16_logits_are_computed_in_float32():
    logits, tokens = logits_and_tokens()
    logprobs = token_logprobs(logits.bfloat16(), tokens)
    assert logprobs.dtype == torch.float32
    exact = Categorical(logits=logits.bfloat16().double()).log_prob(tokens)
    torch.testing.assert_close(logprobs.double(), exact, **TIGHT)


def test_logprobs_with_banned_tokens():
    """-inf logits: as if the entries were absent; the gradient is finite."""
    logits, _ = logits_and_tokens(v=10)
    tokens = torch.randint(0, 8, logits.shape[:2], generator=torch.Generator().manual_seed(2))
    logits[..., 8:] = -torch.inf
    logits.requires_grad_()
    logprobs = token_logprobs(logits, tokens)
    torch.testing.assert_close(logprobs, token_logprobs(logits[..., :8], tokens))
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert gradient.isfinite().all() and (gradient[..., 8:] == 0).all()


# ---------------------------------------------------------------------------------------------------------- policy_loss


def trl_loss(
    logprobs,
    old_logprobs,
    advantages,
    mask,
    clip_low=0.2,
    clip_high=0.28,
    tokens=None,
    beta=0.0,
    ref=None,
):
    """GRPOTrainer._compute_loss itself, on a stand-in that hands it the log-probs. Its loss is the token mean of this
    batch ("bnpo"), or with `tokens`, the number in the whole optimiser step, "dapo"."""
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            logprobs,
            torch.zeros_like(logprobs),
            None,
        ),
        loss_type="bnpo" if tokens is None else "dapo",
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        beta=beta,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        _entropy_bonus_enabled=False,
        current_gradient_accumulation_steps=1,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(
            num_processes=1, reduce=lambda x, reduction: x, gather=lambda x: x
        ),
        args=SimpleNamespace(delta=None, use_bias_correction_kl=False, steps_per_generation=1),
        _metrics={"train": defaultdict(list)},
    )
    ids = torch.zeros(mask.shape, dtype=torch.long)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_per_token_logps": old_logprobs,
        "ref_per_token_logps": ref,
        "num_items_in_batch": tokens,
    }
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


def loss_by_loop(logprobs, old_logprobs, advantages, mask, clip_low=0.2, clip_high=0.28):
    """Token by token, in Python floats."""
    terms, low, high = [], 0, 0
    for i, j in mask.nonzero().tolist():
        ratio, a = (logprobs[i, j] - old_logprobs[i, j]).exp().item(), advantages[i].item()
        terms.append(min(ratio * a, min(max(ratio, 1 - clip_low), 1 + clip_high) * a))
        low += ratio < 1 - clip_low and a < 0
        high += ratio > 1 + clip_high and a > 0
    return -sum(terms) / len(terms), low / len(terms), high / len(terms)


CLIPS = [(0.2, 0.28), (0.1, 0.1), (0.0, 0.5), (1.0, 10.0)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clips", CLIPS)
def test_loss_gradient_and_clip_shares_equal_trl(clips, seed):
    arguments = batch(seed=seed)
    loss, metrics, gradient = loss_metrics_gradient(
        **arguments, clip_low=clips[0], clip_high=clips[1]
    )
    logprobs = arguments.pop("logprobs").requires_grad_()
    theirs, their_metrics = trl_loss(logprobs, **arguments, clip_low=clips[0], clip_high=clips[1])
    torch.testing.assert_close(loss, theirs.detach(), **TIGHT)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, logprobs)[0], **TIGHT)
    assert metrics["clip/low"].item() == pytest.approx(their_metrics["clip_ratio/low_mean"])
    assert metrics["clip/high"].item() == pytest.approx(their_metrics["clip_ratio/high_mean"])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clips", CLIPS)
def test_loss_and_clip_shares_equal_a_loop(clips, seed):
    arguments = batch(seed=seed)
    loss, metrics, _ = loss_metrics_gradient(**arguments, clip_low=clips[0], clip_high=clips[1])
    expected = loss_by_loop(**arguments, clip_low=clips[0], clip_high=clips[1])
    assert (loss.item(), metrics["clip/low"].item(), metrics["clip/high"].item()) == pytest.approx(
        expected, abs=1e-6
    )


def test_loss_and_clips_by_hand():
    """Five tokens, A = +1 then -1. Clipped: a ratio above 1.28 that A > 0 raises on, below 0.8 that A < 0 lowers on."""
    ratios = torch.tensor([[2.0, 0.5, 1.0], [2.0, 0.5, 9.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    arguments = {
        "old_logprobs": torch.zeros(2, 3),
        "advantages": torch.tensor([1.0, -1.0]),
        "mask": mask,
    }
    loss, metrics, gradient = loss_metrics_gradient(logprobs=ratios.log(), **arguments)
    assert loss.item() == pytest.approx(-(1.28 + 0.5 + 1.0 - 2.0 - 0.8) / 5, abs=1e-6)
    assert metrics == {"clip/low": pytest.approx(1 / 5), "clip/high": pytest.approx(1 / 5)}
    expected = (
        torch.tensor([[0.0, -0.5, -1.0], [2.0, 0.0, 0.0]]) / 5
    )  # -rho A / 5 where the clip does not bind
    torch.testing.assert_close(gradient, expected)


def test_clip_shares_are_the_shares_of_tokens_without_a_gradient():
    arguments = batch(rows=40)
    _, metrics, gradient = loss_metrics_gradient(**arguments)
    idle = (gradient == 0) & arguments["mask"]
    share = idle.sum() / arguments["mask"].sum()
    torch.testing.assert_close(metrics["clip/low"] + metrics["clip/high"], share)
    assert (
        metrics["clip/low"] > 0
        and metrics["clip/high"] > 0
        and metrics["clip/low"] != metrics["clip/high"]
    )
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e4])
def test_garbage_at_padding_changes_neither_value_nor_gradient(garbage, name):
    clean = batch()
    dirty = clean | {name: clean[name].masked_fill(~clean["mask"], garbage)}
    torch.testing.assert_close(loss_metrics_gradient(**dirty), loss_metrics_gradient(**clean))
    both = clean | {
        n: clean[n].masked_fill(~clean["mask"], garbage) for n in ("logprobs", "old_logprobs")
    }
    loss, _, gradient = loss_metrics_gradient(**both)
    assert loss.isfinite() and (gradient[~clean["mask"]] == 0).all() and gradient.isfinite().all()


def test_an_advantage_of_an_empty_response_may_be_anything():
    """A prompt that is left out by its mask: its advantage, however wrong, does not reach the loss."""
    clean = batch()
    dirty = clean | {"advantages": clean["advantages"].index_fill(0, torch.tensor([5]), torch.nan)}
    torch.testing.assert_close(loss_metrics_gradient(**dirty), loss_metrics_gradient(**clean))


def test_no_gradient_reaches_old_logprobs_that_are_detached_and_no_argument_changes():
    arguments = batch()
    before = {name: value.clone() for name, value in arguments.items()}
    loss_metrics_gradient(**arguments)
    assert all(torch.equal(arguments[name], before[name]) for name in before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"logprobs": torch.zeros(6, 6)},
            r"shapes do not agree: logprobs \(6, 6\), old_logprobs \(6, 7\)",
        ),
        ({"old_logprobs": torch.zeros(6, 1)}, r"old_logprobs \(6, 1\)"),
        ({"mask": torch.ones(1, 7, dtype=torch.bool)}, r"mask \(1, 7\)"),
        ({"advantages": torch.zeros(6, 1)}, r"advantages \(6, 1\)"),
        ({"advantages": torch.zeros(7)}, r"advantages \(7,\)"),
        ({"mask": torch.zeros(6, 7, dtype=torch.bool)}, "no response token"),
        ({"normalizer": 0}, "no response token"),
        ({"normalizer": torch.tensor(0)}, "no response token"),
    ],
)
def test_policy_loss_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(**batch() | change)


def test_trap_11_the_end_token_gets_its_gradient_when_it_equals_padding():
    """The mask comes from positions: log-probs and loss never look at token values but to gather them."""
    eos = pad = 0
    tokens = torch.tensor([[3, 4, eos, pad, pad], [2, 1, 3, 4, eos]])
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    logits = torch.randn(2, 5, 6, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logprobs = token_logprobs(logits, tokens)
    loss, _ = policy_loss(logprobs, logprobs.detach(), torch.tensor([1.0, -1.0]), mask)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient.abs().sum(-1) > 0, mask)
    assert (
        gradient[0, 2, eos] < 0 < gradient[1, 4, eos]
    )  # descent makes the good response end, and the bad one not


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 2, 3], [1] * 5 + [1]])
def test_trap_15_micro_batches_add_up_to_the_whole(sizes):
    """With the normaliser of the optimiser step, loss, metrics and gradient do not depend on the split; TRL agrees."""
    arguments = batch()
    whole_loss, whole_metrics, whole_gradient = loss_metrics_gradient(**arguments)
    tokens = arguments["mask"].sum()
    parts = [
        dict(zip(arguments, p, strict=True))
        for p in zip(*(x.split(sizes) for x in arguments.values()), strict=True)
    ]
    losses, metrics, gradients = zip(
        *(loss_metrics_gradient(**part, normalizer=tokens) for part in parts), strict=True
    )
    torch.testing.assert_close(sum(losses), whole_loss, **TIGHT)
    torch.testing.assert_close(torch.cat(gradients), whole_gradient, **TIGHT)
    for name, value in whole_metrics.items():
        torch.testing.assert_close(sum(m[name] for m in metrics), value, **TIGHT)
    for part, loss in zip(parts, losses, strict=True):
        torch.testing.assert_close(loss, trl_loss(**part, tokens=tokens)[0], **TIGHT)
    if len(sizes) > 1 and arguments["mask"].sum(1)[: sizes[0]].sum() * len(sizes) != tokens:
        own = [policy_loss(**part)[0] for part in parts if part["mask"].any()]
        assert (
            sum(own) / len(own) - whole_loss
        ).abs() > 1e-3  # what a normaliser per micro-batch would do


def test_normalizer_may_be_a_number_or_a_tensor():
    arguments = batch()
    expected = policy_loss(**arguments)[0] * arguments["mask"].sum() / 100
    for normalizer in (100, 100.0, torch.tensor(100)):
        torch.testing.assert_close(policy_loss(**arguments, normalizer=normalizer)[0], expected)


def test_trap_18_the_loss_is_zero_and_the_gradient_is_not():
    """One update per batch, no KL, equal lengths: ratio 1, advantages that sum to 0."""
    logprobs = torch.full((4, 3), -1.0, requires_grad=True)
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).flatten()
    mask = torch.ones(4, 3, dtype=torch.bool)
    loss, metrics = policy_loss(logprobs, logprobs.detach(), advantages, mask)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    assert abs(loss.item()) < 1e-6 and metrics == {"clip/low": 0, "clip/high": 0}
    torch.testing.assert_close(gradient, -advantages[:, None].expand(4, 3) / 12)


# ---------------------------------------------------------------------------------------------------------------- kl_k3


def test_k3_by_hand():
    """pi = 1/2, pi_ref = 1/4: d = -log 2, k3 = 1/2 + log 2 - 1; equal policies: 0."""
    logprobs, ref = torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0.25, 0.3]]).log()
    torch.testing.assert_close(
        kl_k3(logprobs, ref), torch.tensor([[0.193147, 0.0]]), atol=1e-6, rtol=0
    )


@pytest.mark.parametrize("beta", [0.04, 1.0])
def test_loss_with_k3_and_its_gradient_equal_trl(beta):
    arguments = batch()
    logprobs, mask = arguments.pop("logprobs").requires_grad_(), arguments["mask"]
    ref = arguments["old_logprobs"] - torch.rand(
        mask.shape, generator=torch.Generator().manual_seed(3)
    )
    k3 = kl_k3(logprobs, ref).masked_fill(~mask, 0.0).sum() / mask.sum()
    ours = policy_loss(logprobs, **arguments)[0] + beta * k3
    theirs, metrics = trl_loss(logprobs, **arguments, beta=beta, ref=ref)
    assert k3.item() == pytest.approx(metrics["kl"], rel=1e-5)
    torch.testing.assert_close(ours, theirs, **TIGHT)
    pair = (torch.autograd.grad(loss, logprobs, retain_graph=True)[0] for loss in (ours, theirs))
    torch.testing.assert_close(*pair, **TIGHT)


def test_k3_is_an_unbiased_estimate_of_the_kl_and_never_negative():
    """Its expectation under pi, summed over the whole vocabulary, is KL(pi || pi_ref)."""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 5, 30, generator=generator, dtype=torch.float64)
    logprobs, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    k3 = kl_k3(logprobs, ref)
    expected = kl_divergence(Categorical(logits=logits), Categorical(logits=ref_logits))
    torch.testing.assert_close((logprobs.exp() * k3).sum(-1), expected)
    assert (k3 >= 0).all() and not torch.allclose(k3, kl_k3(ref, logprobs))

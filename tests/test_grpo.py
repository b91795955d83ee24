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
from torch import Tensor
from torch.distributions import Categorical, kl_divergence
from transformers.loss.loss_utils import ForCausalLMLoss
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import nanstd, selective_log_softmax

import grpo
import tsec
from grpo import (
    equal_groups,
    group_advantages,
    importance_weights,
    kl_k3,
    policy_loss,
    token_logprobs,
)

TIGHT = {"atol": 1e-6, "rtol": 1e-5}  # float32 rounding


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def batch(rows: int = 6, length: int = 7, seed: int = 0) -> dict[str, Tensor]:
    """Arguments of policy_loss: responses of different lengths, the last one empty.

    There are ratios on both sides of both clips, for both signs of A.
    """
    generator = seeded(seed)
    old = -torch.rand(rows, length, generator=generator) * 3
    lengths = torch.randint(1, length + 1, (rows, 1), generator=generator)
    lengths[-1] = 0
    return {
        "logprobs": old + 0.4 * torch.randn(rows, length, generator=generator),
        "old_logprobs": old,
        "advantages": torch.randn(rows, generator=generator),
        "mask": torch.arange(length) < lengths,
    }


def loss_metrics_gradient(**arguments) -> tuple[Tensor, dict[str, Tensor], Tensor]:
    logprobs = arguments.pop("logprobs").clone().requires_grad_()
    loss, metrics = policy_loss(logprobs, **arguments)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    return loss.detach(), metrics, gradient


# ----------------------------------------------------------------------------- group_advantages


def test_advantages_by_hand():
    """1, 0, 0, 0: mean 1/4, variance (9 + 3) / 16 / 3 = 1/4: (3/4) / (1/2) and -(1/4) / (1/2)."""
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [2.0, 4.0, 2.0, 4.0]])
    a = 3**0.5 / 2
    expected = torch.tensor([[1.5, -0.5, -0.5, -0.5], [-a, a, -a, a]])
    torch.testing.assert_close(group_advantages(rewards), expected, atol=5e-6, rtol=0)
    expected = [[0.75, -0.25, -0.25, -0.25], [-1.0, 1.0, -1.0, 1.0]]
    assert group_advantages(rewards, scale="none").tolist() == expected


@st.composite
def reward_groups(draw) -> Tensor:
    """(P, G) float64"""
    groups, size = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    reward = st.sampled_from([0.0, 0.1, 0.9, 1.0, -2.5])
    values = draw(st.lists(reward, min_size=groups * size, max_size=groups * size))
    return torch.tensor(values, dtype=torch.float64).view(groups, size)


@settings(max_examples=100, deadline=None)
@given(reward_groups(), st.sampled_from([1e-6, 1e-4, 0.5]), st.sampled_from(["std", "none"]))
def test_advantages_equal_python_and_trl(rewards, eps, scale):
    """statistics.stdev divides by G - 1, and so does TRL's nanstd."""
    advantages, expected = group_advantages(rewards, eps, scale), []
    for group in rewards.tolist():
        mean = statistics.fmean(group)
        divisor = statistics.stdev(group) + eps if scale == "std" else 1.0
        expected.append([(reward - mean) / divisor for reward in group])
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(advantages, expected, atol=1e-9, rtol=1e-9)
    if scale == "std":
        centred = rewards - rewards.nanmean(1, keepdim=True)
        trl = centred / (nanstd(rewards, dim=1, keepdim=True) + eps)
        torch.testing.assert_close(advantages, trl, **TIGHT)  # its G / (G - 1) is a float32


@settings(max_examples=50, deadline=None)
@given(reward_groups())
def test_advantages_of_a_group_sum_to_zero_and_forget_shift_and_scale(rewards):
    advantages = group_advantages(rewards)
    assert advantages.shape == rewards.shape and advantages.sum(dim=1).abs().max() < 1e-9
    torch.testing.assert_close(group_advantages(10 * rewards + 3), advantages, atol=1e-4, rtol=1e-4)
    alone = torch.cat([group_advantages(group[None]) for group in rewards])
    torch.testing.assert_close(alone, advantages)


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


@pytest.mark.parametrize(
    "rewards",
    [
        torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]),
        torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bool(),
        torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).to(torch.uint8),
        torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]]).bfloat16(),
        [[1, 0, 0, 0], [1, 1, 1, 1]],
    ],
)
@pytest.mark.parametrize("scale", ["std", "none"])
def test_rewards_of_any_kind_are_read_as_numbers(rewards, scale):
    floats = torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 1]])
    advantages = group_advantages(rewards, scale=scale)
    assert advantages.dtype == torch.float32
    assert torch.equal(advantages, group_advantages(floats, scale=scale))
    assert group_advantages(floats.double()).dtype == torch.float64


def test_bfloat16_rewards_are_not_rounded_again():
    rewards = torch.tensor([[0.9, 0.1, 0.5, 0.3]]).bfloat16()
    assert torch.equal(group_advantages(rewards), group_advantages(rewards.float()))


def test_group_advantages_refuses_an_unknown_scale():
    with pytest.raises(ValueError, match="'std' or 'none', got 'batch'"):
        group_advantages(torch.eye(2), scale="batch")


def test_trap_12_zero_variance_is_that_of_the_accuracy():
    """Other filters look at the reward: its mean, or whether it differs within the group.

    Group 0 is all wrong and well formatted: its mean is not 0. Group 1 is all wrong and one
    response is badly formatted: its rewards differ. Both teach nothing.
    """
    accuracy = torch.tensor([[0, 0, 0], [0, 0, 0], [1, 1, 1], [0, 1, 0], [1, 0, 0]]).float()
    formats = torch.tensor([[1, 1, 1], [1, 0, 1], [1, 1, 1], [1, 1, 1], [0, 0, 0]]).float()
    rewards = 0.9 * accuracy + 0.1 * formats
    assert equal_groups(accuracy).tolist() == [True, True, True, False, False]
    assert (rewards.mean(dim=1)[:2] > 0).all() and not equal_groups(rewards)[1]


@pytest.mark.parametrize("scale", ["std", "none"])
@pytest.mark.parametrize("reward", [1.1, 0.1, 0.9, 1 / 3, 1e4, -7.7])
def test_trap_13_equal_rewards_get_exactly_zero(reward, scale):
    """15 rewards of 1.1: their float32 mean is not 1.1, and the difference is divided by itself."""
    for G in range(2, 33):
        rewards = torch.full((2, G), reward)
        rewards[1, 0] += 1.0  # the rule is for each group on its own
        advantages = group_advantages(rewards, scale=scale)
        assert (advantages[0] == 0).all() and advantages[1, 0] > 0
    naive = torch.full((15,), 1.1)
    naive = (naive - naive.mean()) / (naive.std(correction=1) + 1e-6)
    assert naive.abs().max() > 0.05


def test_trap_14_std_divides_by_g_minus_one():
    """The winner of four gets 1.50. Dividing by G it would get 1.73."""
    advantages = group_advantages(torch.tensor([[0.0, 0.0, 1.0, 0.0]]))
    assert advantages[0, 2].item() == pytest.approx(1.5, abs=1e-4)


# ------------------------------------------------------------------------------- token_logprobs


def logits_and_tokens(vocabulary: int = 60, allowed: int = 60) -> tuple[Tensor, Tensor]:
    generator = seeded(0)
    logits = 3 * torch.randn(4, 5, vocabulary, generator=generator)
    return logits, torch.randint(0, allowed, (4, 5), generator=generator)


def test_logprobs_by_hand():
    """Odds 1 : 3, and at temperature 1/2 their squares, 1 : 9."""
    logits, tokens = torch.tensor([[[1.0, 3.0], [1.0, 3.0]]]).log(), torch.tensor([[1, 0]])
    for temperature, p in ((1.0, 0.75), (0.5, 0.9)):
        expected = torch.tensor([[p, 1 - p]]).log()
        torch.testing.assert_close(token_logprobs(logits, tokens, temperature), expected)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_logprobs_and_gradient_equal_trl_and_torch_distributions(temperature):
    logits, tokens = logits_and_tokens()
    weights = torch.randn(tokens.shape, generator=seeded(1))

    def exact(x: Tensor, tokens: Tensor, temperature: float) -> Tensor:
        return Categorical(logits=x.double() / temperature).log_prob(tokens).float()

    def value_and_gradient(function) -> tuple[Tensor, Tensor]:
        x = logits.clone().requires_grad_()
        value = function(x, tokens, temperature)
        return value.detach(), torch.autograd.grad((value * weights).sum(), x)[0]

    ours = value_and_gradient(token_logprobs)
    for other in (selective_log_softmax, exact):
        torch.testing.assert_close(ours, value_and_gradient(other), **TIGHT)


def test_logprobs_of_bfloat16_logits_are_computed_in_float32():
    logits, tokens = logits_and_tokens()
    logprobs = token_logprobs(logits.bfloat16(), tokens)
    assert logprobs.dtype == torch.float32
    exact = Categorical(logits=logits.bfloat16().double()).log_prob(tokens)
    torch.testing.assert_close(logprobs.double(), exact, **TIGHT)


def test_a_causal_model_s_logits_predict_the_next_token():
    """The slice of the usage example, by the labels of transformers."""
    L, T, V = 5, 3, 11
    sequence, logits = torch.randint(V, (4, L + T)), torch.randn(4, L + T, V)
    logprobs = token_logprobs(logits[:, L - 1 : -1], sequence[:, L:])
    labels = torch.where(torch.arange(L + T) < L, -100, sequence)
    loss = ForCausalLMLoss(logits, labels, V)
    torch.testing.assert_close(-logprobs.mean(), loss)
    assert "logits[:, L-1:-1]" in grpo.__doc__ and "logits[:, L-1:-1]" in tsec.__doc__


def test_logprobs_with_banned_tokens():
    """-inf logits: as if the entries were absent, and the gradient is finite."""
    logits, tokens = logits_and_tokens(vocabulary=10, allowed=8)
    logits[..., 8:] = -torch.inf
    logits.requires_grad_()
    logprobs = token_logprobs(logits, tokens)
    torch.testing.assert_close(logprobs, token_logprobs(logits[..., :8], tokens))
    (gradient,) = torch.autograd.grad(logprobs.sum(), logits)
    assert gradient.isfinite().all() and (gradient[..., 8:] == 0).all()


# ---------------------------------------------------------------------------------- policy_loss


def trl_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    tokens: Tensor | None = None,
    beta: float = 0.0,
    ref: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """GRPOTrainer._compute_loss itself, on a stand-in that hands it the log-probs.

    Its loss is the token mean of this batch ("bnpo"), or with `tokens`, the number of the whole
    optimiser step, "dapo".
    """
    scored = (logprobs, torch.zeros_like(logprobs), None)
    accelerator = SimpleNamespace(num_processes=1, gather=lambda x: x)
    accelerator.reduce = lambda x, reduction: x
    options = dict(delta=None, use_bias_correction_kl=False, steps_per_generation=1)
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: scored,
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
        accelerator=accelerator,
        args=SimpleNamespace(**options),
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


def loss_by_loop(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float,
    clip_high: float,
) -> tuple[float, float, float]:
    """Token by token, in Python floats.   -> loss, share clipped below, above"""
    total, low, high, tokens = 0.0, 0, 0, mask.nonzero().tolist()
    for i, t in tokens:
        ratio, a = (logprobs[i, t] - old_logprobs[i, t]).exp().item(), advantages[i].item()
        total += min(ratio * a, min(max(ratio, 1 - clip_low), 1 + clip_high) * a)
        low += ratio < 1 - clip_low and a < 0
        high += ratio > 1 + clip_high and a > 0
    return -total / len(tokens), low / len(tokens), high / len(tokens)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clips", [(0.2, 0.28), (0.1, 0.1), (0.0, 0.5), (1.0, 10.0)])
def test_loss_gradient_and_clip_shares_equal_trl_and_a_loop(clips, seed):
    arguments = batch(seed=seed) | {"clip_low": clips[0], "clip_high": clips[1]}
    loss, metrics, gradient = loss_metrics_gradient(**arguments)
    found = (loss.item(), metrics["clip/low"].item(), metrics["clip/high"].item())
    assert found == pytest.approx(loss_by_loop(**arguments), abs=1e-6)
    leaf = arguments["logprobs"].requires_grad_()
    theirs, their_metrics = trl_loss(**arguments)
    shares = (their_metrics["clip_ratio/low_mean"], their_metrics["clip_ratio/high_mean"])
    assert found == pytest.approx((theirs.item(), *shares), rel=1e-5, abs=1e-6)
    torch.testing.assert_close(gradient, torch.autograd.grad(theirs, leaf)[0], **TIGHT)


def test_loss_and_clips_by_hand():
    """Five tokens, A = 1, then -1. Clipped: above 1.28 where A > 0, below 0.8 where A < 0."""
    ratios = torch.tensor([[2.0, 0.5, 1.0], [2.0, 0.5, 9.0]])
    loss, metrics, gradient = loss_metrics_gradient(
        logprobs=ratios.log(),
        old_logprobs=torch.zeros(2, 3),
        advantages=torch.tensor([1.0, -1.0]),
        mask=torch.tensor([[True, True, True], [True, True, False]]),
    )
    assert loss.item() == pytest.approx(-(1.28 + 0.5 + 1.0 - 2.0 - 0.8) / 5, abs=1e-6)
    assert metrics == {"clip/low": pytest.approx(1 / 5), "clip/high": pytest.approx(1 / 5)}
    expected = torch.tensor([[0.0, -0.5, -1.0], [2.0, 0.0, 0.0]]) / 5  # -rho A / 5 if not clipped
    torch.testing.assert_close(gradient, expected)


def test_clip_shares_are_the_shares_of_tokens_without_a_gradient():
    arguments = batch(rows=40)
    _, metrics, gradient = loss_metrics_gradient(**arguments)
    low, high = metrics["clip/low"], metrics["clip/high"]
    idle = (gradient == 0) & arguments["mask"]
    torch.testing.assert_close(low + high, idle.sum() / arguments["mask"].sum())
    assert low > 0 and high > 0 and low != high
    assert not low.requires_grad and not high.requires_grad


@pytest.mark.parametrize(
    "names", [("logprobs",), ("old_logprobs",), ("logprobs", "old_logprobs")], ids="+".join
)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, 1e4])
def test_garbage_at_padding_changes_neither_value_nor_gradient(garbage, names):
    """Nor does the advantage of an empty response, such as one of a prompt that is left out."""
    clean = batch()
    dirty, padding = dict(clean), ~clean["mask"]
    for name in names:
        dirty[name] = clean[name].masked_fill(padding, garbage)
    dirty["advantages"] = clean["advantages"].masked_fill(padding.all(dim=1), torch.nan)
    found = loss_metrics_gradient(**dirty)
    torch.testing.assert_close(found, loss_metrics_gradient(**clean))
    assert (found[2][padding] == 0).all()


def test_no_argument_changes():
    arguments = batch()
    before = {name: value.clone() for name, value in arguments.items()}
    loss_metrics_gradient(**arguments)
    for name, value in arguments.items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"logprobs": torch.zeros(6, 6)}, r"logprobs \(6, 6\), old_logprobs \(6, 7\)"),
        ({"old_logprobs": torch.zeros(6, 1)}, r"old_logprobs \(6, 1\)"),
        ({"mask": torch.ones(1, 7, dtype=torch.bool)}, r"mask \(1, 7\)"),
        ({"advantages": torch.zeros(6, 1)}, r"advantages \(6, 1\)"),
        ({"advantages": torch.zeros(7)}, r"advantages \(7,\)"),
        ({"mask": torch.zeros(6, 7, dtype=torch.bool)}, "no response token"),
        ({"mask": torch.ones(6, 7)}, "mask must be torch.bool, got torch.float32: pass mask.bool"),
        ({"mask": torch.ones(6, 7, dtype=torch.long)}, "got torch.int64"),
        ({"normalizer": 0}, "no response token"),
        ({"normalizer": torch.tensor(0)}, "no response token"),
    ],
)
def test_policy_loss_refuses(change, message):
    with pytest.raises(ValueError, match=message):
        policy_loss(**batch() | change)


def test_old_logprobs_and_advantages_are_constants():
    """The same tensor for new and old is the usual slip: its gradient would cancel to zero."""
    arguments = batch()
    logprobs, advantages = arguments["logprobs"].clone(), arguments["advantages"].clone()
    logprobs.requires_grad_()
    arguments |= {"logprobs": logprobs, "old_logprobs": logprobs}
    (right,) = torch.autograd.grad(
        policy_loss(**arguments | {"old_logprobs": logprobs.detach()})[0], logprobs
    )
    arguments["advantages"] = advantages.requires_grad_()
    policy_loss(**arguments)[0].backward()
    assert torch.equal(logprobs.grad, right) and right.abs().max() > 0 and advantages.grad is None


def test_trap_11_the_end_token_gets_its_gradient_when_it_equals_padding():
    """The mask comes from positions. Descent makes the good response end, and the bad one not."""
    eos = pad = 0
    tokens = torch.tensor([[3, 4, eos, pad, pad], [2, 1, 3, 4, eos]])
    mask = torch.arange(5) < torch.tensor([[3], [5]])
    logits = torch.randn(2, 5, 6, generator=seeded(0)).requires_grad_()
    logprobs = token_logprobs(logits, tokens)
    loss, _ = policy_loss(logprobs, logprobs.detach(), torch.tensor([1.0, -1.0]), mask)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert torch.equal(gradient.abs().sum(-1) > 0, mask)
    assert gradient[0, 2, eos] < 0 < gradient[1, 4, eos]


@pytest.mark.parametrize("sizes", [[6], [3, 3], [1, 2, 3], [1] * 6])
def test_trap_15_micro_batches_add_up_to_the_whole(sizes):
    """With the tokens of the optimiser step as normaliser, the split does not matter."""
    arguments = batch()
    loss, metrics, gradient = loss_metrics_gradient(**arguments)
    tokens, start = arguments["mask"].sum(), 0
    sums, gradients, naive = defaultdict(float), [], []
    for size in sizes:
        part = {name: x[start : start + size] for name, x in arguments.items()}
        start += size
        part_loss, part_metrics, part_gradient = loss_metrics_gradient(**part, normalizer=tokens)
        torch.testing.assert_close(part_loss, trl_loss(**part, tokens=tokens)[0], **TIGHT)
        for name, value in (part_metrics | {"loss": part_loss}).items():
            sums[name] = sums[name] + value
        gradients.append(part_gradient)
        if part["mask"].any():
            naive.append(policy_loss(**part)[0])
    torch.testing.assert_close(dict(sums), metrics | {"loss": loss}, **TIGHT)
    torch.testing.assert_close(torch.cat(gradients), gradient, **TIGHT)
    if len(sizes) > 1:  # what a normaliser per micro-batch would do
        assert (sum(naive) / len(naive) - loss).abs() > 1e-3


@pytest.mark.parametrize("normalizer", [100, 100.0, torch.tensor(100)])
def test_normalizer_may_be_a_number_or_a_tensor(normalizer):
    arguments = batch()
    expected = policy_loss(**arguments)[0] * arguments["mask"].sum() / 100
    torch.testing.assert_close(policy_loss(**arguments, normalizer=normalizer)[0], expected)


def test_trap_18_the_loss_is_zero_and_the_gradient_is_not():
    """One update per batch, no KL, equal lengths: ratio 1, advantages that sum to 0."""
    logprobs = torch.full((4, 3), -1.0)
    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]])).flatten()
    mask = torch.ones(4, 3, dtype=torch.bool)
    loss, metrics, gradient = loss_metrics_gradient(
        logprobs=logprobs, old_logprobs=logprobs, advantages=advantages, mask=mask
    )
    assert abs(loss.item()) < 1e-6 and metrics == {"clip/low": 0, "clip/high": 0}
    torch.testing.assert_close(gradient, -advantages[:, None].expand(4, 3) / 12)


# ---------------------------------------------------------------------------------------- kl_k3


def test_k3_by_hand():
    """pi = 1/2, pi_ref = 1/4: d = -log 2, k3 = 1/2 + log 2 - 1. Equal policies: 0."""
    k3 = kl_k3(torch.tensor([[0.5, 0.3]]).log(), torch.tensor([[0.25, 0.3]]).log())
    torch.testing.assert_close(k3, torch.tensor([[0.193147, 0.0]]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("beta", [0.04, 1.0])
def test_loss_with_k3_and_its_gradient_equal_trl(beta):
    arguments = batch()
    leaf, mask = arguments["logprobs"].requires_grad_(), arguments["mask"]
    ref = arguments["old_logprobs"] - torch.rand(mask.shape, generator=seeded(3))
    k3 = kl_k3(leaf, ref).masked_fill(~mask, 0.0).sum() / mask.sum()
    ours = policy_loss(**arguments)[0] + beta * k3
    theirs, metrics = trl_loss(**arguments, beta=beta, ref=ref)
    assert k3.item() == pytest.approx(metrics["kl"], rel=1e-5)
    torch.testing.assert_close(ours, theirs, **TIGHT)
    gradients = [torch.autograd.grad(loss, leaf, retain_graph=True)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*gradients, **TIGHT)


def test_k3_is_an_unbiased_estimate_of_the_kl_and_never_negative():
    """Its expectation under pi, summed over the whole vocabulary, is KL(pi || pi_ref)."""
    logits, ref_logits = torch.randn(2, 5, 30, generator=seeded(0), dtype=torch.float64)
    logprobs, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    k3 = kl_k3(logprobs, ref)
    expected = kl_divergence(Categorical(logits=logits), Categorical(logits=ref_logits))
    torch.testing.assert_close((logprobs.exp() * k3).sum(-1), expected)
    assert (k3 >= 0).all() and not torch.allclose(k3, kl_k3(ref, logprobs))


# ------------------------------------------------------------------------- importance weights


def test_importance_weights_by_hand():
    """Ratios e^0.5, e^2 = 7.39 cut to 3, e^-1, and 1 at padding, whatever stands there."""
    trainer = torch.tensor([[-1.0, -0.5, -3.0, 9.0]])
    sampler = torch.tensor([[-1.5, -2.5, -2.0, float("nan")]])
    mask = torch.tensor([[True, True, True, False]])
    weights, ratio = importance_weights(trainer, sampler, mask)
    torch.testing.assert_close(ratio, torch.tensor([[0.5, 2.0, -1.0, 0.0]]).exp())
    torch.testing.assert_close(weights, torch.tensor([[1.648721, 3.0, 0.367879, 1.0]]))
    assert importance_weights(trainer, sampler, mask, cap=1.5)[0].max() == 1.5


def test_weights_multiply_each_token_and_are_constants():
    arguments = batch()
    weights = torch.rand(arguments["mask"].shape, generator=seeded(1)).requires_grad_()
    _, _, gradient = loss_metrics_gradient(**arguments)
    loss, metrics, weighted = loss_metrics_gradient(**arguments, weights=weights)
    torch.testing.assert_close(weighted, gradient * weights.detach())
    ones = torch.ones_like(weights)
    assert loss_metrics_gradient(**arguments, weights=ones)[0] == policy_loss(**arguments)[0]
    per_token = [policy_loss(**arguments, weights=one)[0] for one in one_hot_rows(weights)]
    torch.testing.assert_close(loss, sum(per_token))
    assert metrics.keys() == {"clip/low", "clip/high"}


def one_hot_rows(weights: Tensor) -> list[Tensor]:
    """The weights of one token each."""
    found = []
    for i, value in enumerate(weights.detach().flatten()):
        one = torch.zeros(weights.numel())
        one[i] = value
        found.append(one.view(weights.shape))
    return found


def test_weighted_gradients_of_another_sampler_are_those_of_the_policy():
    """E_q[w A grad log pi] = E_pi[A grad log pi], enumerated over a vocabulary of 5."""
    logits = torch.randn(5, generator=seeded(2), dtype=torch.float64, requires_grad=True)
    q = torch.tensor([0.1, 0.3, 0.2, 0.15, 0.25], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.5, 2.0, -0.3], dtype=torch.float64)
    logp = logits.log_softmax(-1)
    (want,) = torch.autograd.grad((logp.detach().exp() * advantages * logp).sum(), logits)
    logp = logits.log_softmax(-1)[:, None]
    mask = torch.ones(5, 1, dtype=torch.bool)
    weights, _ = importance_weights(logp.detach(), q.log()[:, None], mask, cap=100.0)
    got = torch.zeros_like(logits)
    for y in range(5):
        row = slice(y, y + 1)
        arguments = (logits.log_softmax(-1)[row, None], logp.detach()[row], advantages[row])
        loss, _ = policy_loss(*arguments, mask[row], weights=weights[row])
        got -= q[y] * torch.autograd.grad(loss, logits)[0]
    torch.testing.assert_close(got, want)

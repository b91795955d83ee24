"""Entropy control in the update: methods that SaEI is compared and combined with.

SaEI acts while sampling. Each method here changes one part of the loss of grpo.py:
    loss_mask        80/20, Clip-Cov       the tokens whose policy gradient counts
    penalty_weights  KL-Cov, SENT          + (1 / #tokens) sum w_it |log pi - log pi_old|
    entropy_coef     fixed, Skywork, AER   - (1 / #tokens) sum c_i H_it
    advantages       ECVGPO, VOGUE         A_i reshaped
SENT also orders the data (extras/curriculum.py). Clip-higher is grpo.policy_loss's clip_high.

Where the rules come from (no code was copied)
    known        80/20 (arXiv 2506.01939), Clip-Cov and KL-Cov (2505.22617), Skywork-OR1
                 (2505.22312), SENT (2512.04359), VOGUE (2510.01444, called DUPL since v2):
                 papers and public code
    second-hand  AER (2510.10959): a coefficient by difficulty, larger for harder prompts; a target
                 below the initial entropy, best near 0.4 of it; a global coefficient that adapts.
                 ECVGPO (2512.06726): self-information reshapes positive samples' advantages
    inferred     the formulas of AER and ECVGPO; their docstrings name the alternatives
    ours         tokens are chosen among all responses of the step, by the policy that sampled
                 (public code of the Covs and SENT: in each micro-batch, by the current policy), so
                 micro-batches do not change the gradient. Sums are divided by the number of tokens
                 of the optimiser step

Symbols: P prompts, G responses per prompt, N = P * G, T tokens (padded). mask is True on a
response's tokens. (P, G, T) may stand for (N, T), with (P, G) for (N,). At pi = pi_old,
|log pi - log pi_old| has no gradient. KL-Cov and SENT therefore act from the second optimiser step
on the same rollouts.

    entropy, mask = torch.rand(4, 9, requires_grad=True), torch.ones(4, 9, dtype=torch.bool)
    loss_mask = top_entropy_tokens(entropy, mask, share=0.2)             # 80/20: (N, T) bool
    coefficient, following = skywork_coefficient(0.001, entropy.mean().item(), target=2.0)
    loss = entropy_bonus(entropy, mask, coefficient)                     # add it to the policy loss
    loss.backward()
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

# ----------------------------------------------------------------------------- choice of tokens


@torch.no_grad()
def top_entropy_tokens(entropy: Tensor, mask: Tensor, share: float = 0.2) -> Tensor:
    """mask_t and H_t >= the (1 - share)-quantile of all tokens' H.   (N, T), (N, T) -> (N, T) bool

    80/20: only these tokens have a policy gradient. It is still divided by the number of all
    tokens. The quantile is interpolated, as in TRL's top_entropy_quantile. Raises ValueError for a
    share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    if not mask.any():
        return mask
    return mask & (entropy >= torch.quantile(entropy[mask].float(), 1 - share))


@torch.no_grad()
def extreme_tokens(values: Tensor, mask: Tensor, share: float, largest: bool = True) -> Tensor:
    """The tokens of largest (or smallest) value.   (N, T), (N, T) -> (N, T) bool

    There are max(1, floor(share * #tokens)). Raises ValueError for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    count = max(1, int(share * mask.sum()))
    values = values.masked_fill(~mask, -torch.inf if largest else torch.inf).flatten()
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.topk(count, largest=largest).indices] = True
    return chosen.view_as(mask) & mask  # & mask: without any token topk takes padding


@torch.no_grad()
def covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """cov_it = (A_i - mean A)(log p_it - mean log p).   (N, T), (N,), (N, T) -> (N, T)

    Means are over all tokens. Padding gets 0. To first order an update lowers the entropy by it:
    likely tokens of good responses and unlikely tokens of bad ones have a positive covariance.
    """
    per_token = advantages[..., None].expand_as(mask)
    cov = (per_token - per_token[mask].mean()) * (logprobs - logprobs[mask].mean())
    return cov.masked_fill(~mask, 0.0)


def clip_cov_tokens(
    cov: Tensor,
    mask: Tensor,
    share: float = 2e-4,
    low: float = 1.0,
    high: float = 5.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """mask without some random tokens of low < cov < high: Clip-Cov.   (N, T) -> (N, T) bool

    max(1, floor(share * #tokens)) tokens lose their policy gradient, or all that qualify if fewer
    do. Tokens that the ratio's clip has silenced may be drawn. The public code leaves them out,
    which needs the current policy. The authors' recipes widen that clip to 1 on both sides.
    generator: on the CPU.
    """
    candidates = ((cov > low) & (cov < high) & mask).flatten().nonzero()[:, 0]
    count = min(max(1, int(share * mask.sum())), len(candidates))
    drawn = torch.randperm(len(candidates), generator=generator)[:count].to(cov.device)
    loss_mask = mask.flatten().clone()
    loss_mask[candidates[drawn]] = False
    return loss_mask.view_as(mask)


def kl_cov_weights(cov: Tensor, mask: Tensor, coef: float = 1.0, share: float = 2e-4) -> Tensor:
    """w = coef on the tokens of largest covariance, else 0: KL-Cov.   (N, T) -> (N, T) float

    Weights for log_ratio_penalty. As published the surrogate is not clipped:
    policy_loss(clip_low=1, clip_high=inf). The default share is that of the authors' 32B recipe.
    Their 7B recipe has 2e-3.
    """
    return coef * extreme_tokens(cov, mask, share).to(cov.dtype)


def sent_weights(
    logprobs: Tensor,
    advantages: Tensor,
    entropy: Tensor,
    mask: Tensor,
    coef: float = 0.1,
    share: float = 2e-4,
    low_entropy: float = 0.8,
    factors: tuple[float, float] = (2.0, 0.5),
) -> Tensor:
    """w = 2 coef on the largest, coef / 2 on the smallest covariances, else 0: SENT.   -> (N, T)

    logprobs, entropy, mask (N, T), advantages (N,). The covariances are those of the low_entropy
    share of tokens with the lowest entropy, with means over these. The surrogate is not clipped, as
    in KL-Cov. A token that is both largest and smallest (the only one) counts as smallest, as in
    the public code. The authors' scripts add k3 to the reference (kl_coef 0.001).
    """
    low = extreme_tokens(entropy, mask, low_entropy, largest=False)
    cov = covariance(logprobs, advantages, low)
    weights = coef * factors[0] * extreme_tokens(cov, low, share).to(cov.dtype)
    smallest = extreme_tokens(cov, low, share, largest=False)
    return weights.masked_fill(smallest, coef * factors[1])


# ---------------------------------------------------------------------------- terms of the loss


def log_ratio_penalty(
    logprobs: Tensor,
    old_logprobs: Tensor,
    weights: Tensor,
    mask: Tensor,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """(1 / normalizer) sum_{i,t} mask w_it |log pi - log pi_old|.   all (N, T) -> scalar

    Add it to the loss. normalizer None: the number of tokens here (see grpo.policy_loss). The
    gradient is w * sign, and 0 where pi = pi_old.
    """
    normalizer = mask.sum() if normalizer is None else normalizer
    distance = (logprobs - old_logprobs).masked_fill(~mask, 0.0).abs()
    return (weights * distance).sum() / normalizer


def entropy_bonus(
    entropy: Tensor, mask: Tensor, coef: float | Tensor, normalizer: float | Tensor | None = None
) -> Tensor:
    """-(1 / normalizer) sum_{i,t} mask c_i H_it.   (N, T), (N, T), number or (N,) -> scalar

    Add it to the loss. normalizer None: the number of tokens here (see grpo.policy_loss). entropy
    must carry its gradient.
    """
    normalizer = mask.sum() if normalizer is None else normalizer
    sums = entropy.masked_fill(~mask, 0.0).sum(dim=-1)  # (N,)
    return -(torch.as_tensor(coef) * sums).sum() / normalizer


# --------------------------------------------------------------------- coefficient of the bonus


def skywork_coefficient(
    coef: float,
    entropy: float,
    target: float,
    step: float = 1e-4,
    low: float = 0.0,
    high: float = 5e-3,
) -> tuple[float, float]:
    """Skywork-OR1.   -> the coefficient of this batch, the one to begin the next batch with

    now = coef if H <= target else 0
    next = clip(coef + step if H <= target else coef - step, low, high)
    H is the token mean over this batch of rollouts (ours: their code and TRL take the batch
    before). step and limits are theirs. train_saei.py uses step = entropy_coef / 10 and
    high = 5 * entropy_coef, which are the same at the published start of 1e-3.
    """
    if entropy <= target:
        return coef, min(max(coef + step, low), high)
    return 0.0, min(max(coef - step, low), high)


def aer_coefficient(
    coef: float, entropy: float, target: float, rate: float, high: float = 1.0
) -> float:
    """clip(coef + rate * (target - H), 0, high): AER's global coefficient for the next batch.

    second-hand: it moves to hold H near target = tau * H_0, tau near 0.4. inferred: proportional
    steps, which come to rest at the target. Alternatives: steps of one size (Skywork's) or gradient
    steps on log coef (SAC's). train_saei.py uses rate = 0.01.
    """
    return min(max(coef + rate * (target - entropy), 0.0), high)


def aer_weights(accuracy: Tensor, threshold: float = 1.0) -> Tensor:
    """w_p = max(0, 1 - mean_G accuracy / threshold), a prompt's share of AER's coefficient.

    (P, G) -> (P,). second-hand: more for harder prompts. inferred: the straight line. A
    threshold < 1 gives nothing to prompts that are easier. Alternatives: 1 below the threshold and
    0 above, or weights divided by their mean, which keeps the total. train_saei.py uses
    threshold = 1. Raises ValueError for a threshold <= 0.
    """
    if threshold <= 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    return (1 - accuracy.float().mean(dim=1) / threshold).clamp(min=0)


# ----------------------------------------------------------------------------------- advantages


@torch.no_grad()
def ecvgpo_advantages(
    advantages: Tensor, logprobs: Tensor, mask: Tensor, power: float = 1.0, eps: float = 1e-6
) -> Tensor:
    """A_i <- A_i (s_i / mean s)^power where A_i > 0, s_i = -mean_t log p_it: ECVGPO.

    (P, G), (P, G, T), (P, G, T) -> (P, G). mean s is over the group's positive responses. power > 0
    favours unlikely responses, which holds the entropy up. power = 0 is plain GRPO. train_saei.py
    uses power = 1. Raises ValueError for power < 0, where a certain response could get any weight.

    inferred: the formula. Alternatives: token by token (one token could decide), the sum over
    tokens (favours length), A_i + c s_i (rewards surprise where A_i is small), s_i not divided by
    its mean (scales with the model's entropy).
    """
    if power < 0:
        raise ValueError(f"power must not be negative, got {power}")
    lengths = mask.sum(dim=2).clamp(min=1)  # (P, G)
    surprise = -logprobs.masked_fill(~mask, 0.0).sum(dim=2) / lengths + eps
    positive = advantages > 0
    count = positive.sum(dim=1, keepdim=True).clamp(min=1)  # (P, 1)
    mean = (surprise * positive).sum(dim=1, keepdim=True) / count
    return torch.where(positive, advantages * (surprise / mean) ** power, advantages)


@torch.no_grad()
def symmetric_kl(logprobs: Tensor, other: Tensor, limit: float = 20.0) -> Tensor:
    """d (1 - exp(-d)) / 2, d = log q - log p, of tokens sampled from q.   (..., T) -> (..., T)

    An unbiased estimate of (KL(q || p) + KL(p || q)) / 2 that is never negative and needs no
    logits. |d| is cut at limit, so that one token that p hardly knows does not give infinity.
    """
    d = (logprobs - other).clamp(-limit, limit)
    return -d * torch.expm1(-d) / 2


@torch.no_grad()
def shaped_advantages(
    advantages: Tensor, uncertainty: Tensor, mask: Tensor, scale: float = 1.0, cap: float = 2.0
) -> Tensor:
    """What VOGUE adds to A_i: min(scale * u_i, |A_i| / cap).   (...,), (..., T) -> (...,)

    u_i = mean_t uncertainty_it. cap > 1 keeps the sign of A. train_saei.py uses VOGUE's values:
    cap = 2 for both bonuses, scale = 1 for symmetric_kl of the two images (responses sampled on the
    changed image) and scale = 0.4 for the entropy (all responses).

    ours: the mean over a response, as A belongs to a response (theirs: token by token). ours: one
    group of clean and adversarial responses (theirs: a group each, the clean one phased out by
    chance).
    """
    lengths = mask.sum(dim=-1).clamp(min=1)
    mean = uncertainty.masked_fill(~mask, 0.0).sum(dim=-1) / lengths
    return torch.minimum(scale * mean, advantages.abs() / cap)


# ----------------------------------------------------------------------------------- all of them


class Treatment(NamedTuple):
    """What a control makes of a batch of rollouts, before it is cut into micro-batches."""

    loss_mask: Tensor  # (P, G, T) bool: the tokens whose policy gradient counts
    penalty_weights: Tensor  # (P, G, T) of |log pi - log pi_old|
    advantages: Tensor  # (P, G)
    entropy_coef: Tensor  # (P, G) of the entropy bonus


def treat(
    control: Any,
    mask: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    accuracy: Tensor,
    mean_entropy: float,
    state: dict[str, float],
    generator: torch.Generator | None = None,
    divergence: Tensor | None = None,
) -> Treatment:
    """The batch as control.update_control treats it. P: the prompts of the whole step.

    control: has the fields of runtime.args.ControlArgs. mask, logprobs, entropy (P, G, T),
    advantages, accuracy (P, G): as sampled. mean_entropy: token mean of the policy on clean images.
    state: holds an adaptive coefficient and is changed. divergence (P, n, T): vogue's, of the last
    n responses.
    """
    loss_mask, weights, coef = mask, torch.zeros_like(logprobs), torch.zeros_like(advantages)
    penalty = {"share": control.cov_share}
    if control.penalty_coef is not None:
        penalty["coef"] = control.penalty_coef
    start = control.entropy_coef
    now = state.get("entropy_coef", start)
    match control.update_control:
        case "bonus":
            coef = torch.full_like(advantages, now)
        case "skywork":
            limits = {"step": start / 10, "high": 5 * start}
            now, state["entropy_coef"] = skywork_coefficient(
                now, mean_entropy, control.skywork_target, **limits
            )
            coef = torch.full_like(advantages, now)
        case "aer":
            state["entropy_start"] = state.get("entropy_start") or mean_entropy
            target = control.aer_target * state["entropy_start"]
            state["entropy_coef"] = aer_coefficient(now, mean_entropy, target, rate=0.01)
            coef = (now * aer_weights(accuracy))[:, None].expand_as(advantages)
        case "ecvgpo":
            advantages = ecvgpo_advantages(advantages, logprobs, mask)
        case "vogue":
            advantages = vogue_advantages(advantages, entropy, mask, divergence)
        case "top_entropy":
            loss_mask = top_entropy_tokens(entropy, mask, control.top_entropy)
        case "clip_cov":
            cov = covariance(logprobs, advantages, mask)
            loss_mask = clip_cov_tokens(cov, mask, control.cov_share, generator=generator)
        case "kl_cov":
            weights = kl_cov_weights(covariance(logprobs, advantages, mask), mask, **penalty)
        case "sent":
            weights = sent_weights(logprobs, advantages, entropy, mask, **penalty)
    return Treatment(loss_mask, weights, advantages, coef)


def vogue_advantages(
    advantages: Tensor, entropy: Tensor, mask: Tensor, divergence: Tensor
) -> Tensor:
    """A plus VOGUE's two bonuses, both by the A of before.   (P, G), (P, G, T) x 2, (P, n, T)"""
    n, T = divergence.shape[1:]
    shaped = advantages + shaped_advantages(advantages, entropy, mask, scale=0.4)
    shaped[:, -n:] += shaped_advantages(advantages[:, -n:], divergence, mask[:, -n:, :T])
    return shaped

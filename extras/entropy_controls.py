"""Entropy control in the update: the methods that SaEI, which acts while sampling, is compared and combined with.

What it computes: each method pulls one of four levers on the loss of grpo.py, chosen before micro-batches are cut
    keep        80/20, Clip-Cov            the tokens whose policy gradient counts
    weights     KL-Cov, SENT               + (1 / #tokens) sum w_it |log pi - log pi_old|
    bonus       fixed, Skywork, AER        - (1 / #tokens) sum c_i H_it
    advantages  ECVGPO, VOGUE              A_i reshaped
and SENT also orders the data, by the semantic entropy of sampled answers (extras/curriculum.py).

Where the rules come from: no code was copied
    known        80/20 (arXiv 2506.01939), Clip-Cov, KL-Cov (2505.22617), Skywork-OR1 (2505.22312), SENT (2512.04359):
                 papers, public code; VOGUE's two bonuses on the advantage (2510.01444, since v2 under the name DUPL)
    second-hand  AER (2510.10959): a coefficient by difficulty, larger for harder prompts; a target below the initial
                 entropy, best near 0.4 of it; a global coefficient moved on line. ECVGPO (2512.06726): positive
                 samples' advantages reshaped by self-information
    inferred     the formulas of AER and ECVGPO; each docstring names the alternatives
    ours         chosen over all responses of the step, by the policy that sampled (public code of the Covs and SENT: in
                 each micro-batch, by the current one): the memory knob does not change the gradient; sums are divided
                 by the number of tokens of the optimiser step

Symbols: P prompts, G responses per prompt, N = P * G, T tokens (padded); mask is True on a response's tokens.
(P, G, T) does where (N, T) stands, with (P, G) for (N,). At pi = pi_old |log pi - log pi_old| has no gradient: KL-Cov
and SENT act from the second optimiser step on the same rollouts. Clip-higher is grpo.policy_loss's clip_high.

    entropy, mask = torch.rand(4, 9, requires_grad=True), torch.ones(4, 9, dtype=torch.bool)
    keep = top_entropy_tokens(entropy, mask, share=0.2)                  # (N, T) -> (N, T) bool: 80/20
    coefficient, following = skywork_coefficient(0.001, entropy.mean().item(), target=2.0)
    loss = entropy_bonus(entropy, mask, coefficient); loss.backward()    # add it to the policy's
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# ------------------------------------------------------------------------------------------ which tokens: keep, weights


@torch.no_grad()
def top_entropy_tokens(entropy: Tensor, mask: Tensor, share: float = 0.2) -> Tensor:
    """keep_t = mask_t and H_t >= the (1 - share) quantile of all tokens' entropies.   (N, T), (N, T) -> (N, T) bool

    80/20: the policy gradient of these alone, still divided by the number of all tokens. The quantile is interpolated,
    as in TRL's top_entropy_quantile. Raises ValueError for a share outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share must be in [0, 1], got {share}")
    if not mask.any():
        return mask
    return mask & (entropy >= torch.quantile(entropy[mask].float(), 1 - share))


@torch.no_grad()
def extreme_tokens(values: Tensor, mask: Tensor, share: float, largest: bool = True) -> Tensor:
    """The max(1, floor(share * #tokens)) tokens of largest, or smallest, value.   (N, T), (N, T) -> (N, T) bool"""
    if not 0 < share <= 1:
        raise ValueError(f"share must be in (0, 1], got {share}")
    values = values.masked_fill(~mask, -torch.inf if largest else torch.inf).flatten()
    chosen = torch.zeros_like(values, dtype=torch.bool)
    chosen[values.topk(max(1, int(share * mask.sum())), largest=largest).indices] = True
    return chosen.view_as(mask) & mask  # & mask: without any token topk takes padding


@torch.no_grad()
def covariance(logprobs: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    """cov_it = (A_i - mean A)(log p_it - mean log p), means over all tokens; 0 at padding.   (N, T), (N,) -> (N, T)

    To first order entropy falls with it: likely tokens of good responses, unlikely ones of bad responses.
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
    """keep = mask but for max(1, floor(share * #tokens)) random ones with low < cov < high.   (N, T) -> (N, T) bool

    Clip-Cov: those tokens lose their policy gradient. Fewer qualify: all of them lose it. Tokens that the ratio's clip
    has silenced may be drawn (the public code leaves them out, which takes the current policy). The authors' recipes
    widen that clip to 1 on both sides. generator: on the CPU.
    """
    candidates = ((cov > low) & (cov < high) & mask).flatten().nonzero()[:, 0]
    count = min(max(1, int(share * mask.sum())), len(candidates))
    drawn = torch.randperm(len(candidates), generator=generator)[:count].to(cov.device)
    keep = mask.flatten().clone()
    keep[candidates[drawn]] = False
    return keep.view_as(mask)


def kl_cov_weights(cov: Tensor, mask: Tensor, coef: float = 1.0, share: float = 2e-4) -> Tensor:
    """w = coef on the share of tokens of largest covariance, else 0: KL-Cov.   (N, T), (N, T) -> (N, T) float

    Weights for log_ratio_penalty. As published the surrogate is not clipped: policy_loss(clip_low=1, clip_high=inf).
    The share is that of the authors' 32B recipe; their 7B one has 2e-3.
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
    """w = 2 coef on the largest, coef / 2 on the smallest covariances of low-entropy tokens, else 0.   -> (N, T) float

    logprobs, entropy, mask (N, T), advantages (N,). SENT: among the 80% of tokens of lowest entropy, by means over
    these; not clipped, as KL-Cov. A token that is both (one to choose from) counts as smallest, as in the public code,
    whose scripts add k3 to the reference (kl_coef 0.001).
    """
    low = extreme_tokens(entropy, mask, low_entropy, largest=False)
    cov = covariance(logprobs, advantages, low)
    weights = coef * factors[0] * extreme_tokens(cov, low, share).to(cov.dtype)
    return weights.masked_fill(extreme_tokens(cov, low, share, largest=False), coef * factors[1])


# ------------------------------------------------------------------------------------------------- terms of the loss


def log_ratio_penalty(
    logprobs: Tensor,
    old_logprobs: Tensor,
    weights: Tensor,
    mask: Tensor,
    normalizer: float | Tensor | None = None,
) -> Tensor:
    """(1 / normalizer) sum_{i,t} mask w_it |log pi - log pi_old|, to add to the loss.   all (N, T) -> scalar

    normalizer None: the number of tokens here; see grpo.policy_loss. The gradient is w * sign: 0 where pi = pi_old.
    """
    normalizer = mask.sum() if normalizer is None else normalizer
    distance = (logprobs - old_logprobs).masked_fill(~mask, 0.0).abs()
    return (weights * distance).sum() / normalizer


def entropy_bonus(
    entropy: Tensor, mask: Tensor, coef: float | Tensor, normalizer: float | Tensor | None = None
) -> Tensor:
    """-(1 / normalizer) sum_{i,t} mask c_i H_it, to add to the loss.   (N, T), (N, T), number or (N,) -> scalar

    normalizer None: the number of tokens here; see grpo.policy_loss. entropy must carry its gradient.
    """
    normalizer = mask.sum() if normalizer is None else normalizer
    return -(torch.as_tensor(coef) * entropy.masked_fill(~mask, 0.0).sum(dim=-1)).sum() / normalizer


# ----------------------------------------------------------------------------------------------- the bonus' coefficient


def skywork_coefficient(
    coef: float,
    entropy: float,
    target: float,
    step: float = 1e-4,
    low: float = 0.0,
    high: float = 5e-3,
) -> tuple[float, float]:
    """-> (coef if H <= target else 0, clip(coef + step if H <= target else coef - step, low, high))

    Skywork-OR1: the coefficient to apply now and the one to begin the next batch with. H is the token mean over this
    batch of rollouts: ours (their code and TRL apply the coefficient by H of the batch before). Step, limits: theirs.
    """
    below = entropy <= target
    return (coef if below else 0.0), min(max(coef + (step if below else -step), low), high)


def aer_coefficient(
    coef: float, entropy: float, target: float, rate: float, high: float = 1.0
) -> float:
    """clip(coef + rate * (target - H), 0, high): the global coefficient for the next batch.

    AER, second-hand: moved on line to hold H near target = tau * H_0, tau near 0.4. The step is inferred: proportional,
    to come to rest at the target. Alternatives: steps of one size (Skywork's), gradient steps on log coef (SAC's).
    """
    return min(max(coef + rate * (target - entropy), 0.0), high)


def aer_weights(accuracy: Tensor, threshold: float = 1.0) -> Tensor:
    """w_p = max(0, 1 - mean_G accuracy / threshold): what a prompt's share of the coefficient is.   (P, G) -> (P,)

    AER, second-hand: more for the harder. The line is inferred; threshold < 1 gives none to prompts easier than that.
    Alternatives: 1 below the threshold and 0 above; weights divided by their mean, so that the total stays.
    """
    if threshold <= 0:
        raise ValueError(f"threshold must be positive, got {threshold}")
    return (1 - accuracy.float().mean(dim=1) / threshold).clamp(min=0)


# ----------------------------------------------------------------------------------------------------------- advantages


@torch.no_grad()
def ecvgpo_advantages(
    advantages: Tensor, logprobs: Tensor, mask: Tensor, power: float = 1.0, eps: float = 1e-6
) -> Tensor:
    """A_i <- A_i (s_i / mean s)^power where A_i > 0, s_i = -mean_t log p_it.   (P, G), (P, G, T), (P, G, T) -> (P, G)

    The mean is over the group's positive responses. ECVGPO's formula is inferred from "self-information reshapes the
    advantages of positive samples". power > 0 favours what was unlikely and holds entropy up, 0 is plain GRPO; < 0 is
    refused: a response that was certain would get any weight. Alternatives: token by token (one token would decide);
    the sum over tokens (favours length); A_i + c s_i (rewards surprise where A_i is small); s_i not divided by its mean
    (scales with the model's entropy).
    """
    if power < 0:
        raise ValueError(f"power must not be negative, got {power}")
    surprise = (
        -logprobs.masked_fill(~mask, 0.0).sum(dim=2) / mask.sum(dim=2).clamp(min=1) + eps
    )  # (P, G)
    positive = advantages > 0
    mean = (surprise * positive).sum(dim=1, keepdim=True) / positive.sum(dim=1, keepdim=True).clamp(
        min=1
    )  # (P, 1)
    return torch.where(positive, advantages * (surprise / mean) ** power, advantages)


@torch.no_grad()
def symmetric_kl(logprobs: Tensor, other: Tensor, limit: float = 20.0) -> Tensor:
    """d (1 - exp(-d)) / 2, d = log q - log p, of tokens sampled from q.   (..., T), (..., T) -> (..., T)

    An unbiased estimate of (KL(q || p) + KL(p || q)) / 2 that is never negative; it needs no logits. |d| is cut at
    limit, or one token that p hardly knows would be infinite.
    """
    d = (logprobs - other).clamp(-limit, limit)
    return -d * torch.expm1(-d) / 2


@torch.no_grad()
def shaped_advantages(
    advantages: Tensor, uncertainty: Tensor, mask: Tensor, scale: float = 1.0, cap: float = 2.0
) -> Tensor:
    """What is added to A_i: min(scale * u_i, |A_i| / cap), u_i = mean_t uncertainty_it.   (...,), (..., T) -> (...,)

    VOGUE: u is the branches' symmetric_kl (scale 1), for the noisy branch's responses, and besides the entropy (scale
    0.4), for all. cap > 1 keeps the sign of A. Ours: the mean over a response, as A is of a response (theirs: token by
    token); one group of both branches, as everywhere here (theirs: one each, the raw one phased out by chance).
    """
    mean = uncertainty.masked_fill(~mask, 0.0).sum(dim=-1) / mask.sum(dim=-1).clamp(min=1)
    return torch.minimum(scale * mean, advantages.abs() / cap)


# ------------------------------------------------------------------------------------------------------ all of them


class Treatment(NamedTuple):
    """What a control makes of a batch of rollouts, before micro-batches are cut."""

    keep: Tensor  # (P, G, T) bool: the tokens whose policy gradient counts
    weights: Tensor  # (P, G, T) of |log pi - log pi_old|
    advantages: Tensor  # (P, G)
    bonus: Tensor  # (P, G) the entropy's coefficient


def treat(
    cfg,
    mask: Tensor,
    logprobs: Tensor,
    entropy: Tensor,
    advantages: Tensor,
    accuracy: Tensor,
    mean_entropy: float,
    state: dict,
    generator: torch.Generator | None = None,
    divergence: Tensor | None = None,
) -> Treatment:
    """The levers as cfg.update_control sets them, by cfg's other fields of train_saei.Config; P are the step's prompts.

    mask, logprobs, entropy (P, G, T), advantages, accuracy (P, G): as sampled. mean_entropy: token mean of the policy
    on clean images. state: holds a coefficient that adapts; it is changed. divergence (P, n, T): vogue's, of the last n
    responses.
    """
    keep, weights, bonus, A = (
        mask,
        torch.zeros_like(logprobs),
        torch.zeros_like(advantages),
        advantages,
    )
    cov = {"share": cfg.cov_share} | (
        {} if cfg.penalty_coef is None else {"coef": cfg.penalty_coef}
    )
    now = state.get("entropy_coef", cfg.entropy_coef)
    match cfg.update_control:
        case "bonus":
            bonus = torch.full_like(A, now)
        case "skywork":
            rule = {"step": cfg.skywork_step, "high": cfg.skywork_max}
            now, state["entropy_coef"] = skywork_coefficient(
                now, mean_entropy, cfg.skywork_target, **rule
            )
            bonus = torch.full_like(A, now)
        case "aer":
            state["entropy_start"] = state.get("entropy_start") or mean_entropy
            target = cfg.aer_target * state["entropy_start"]
            state["entropy_coef"] = aer_coefficient(now, mean_entropy, target, cfg.aer_rate)
            bonus = (now * aer_weights(accuracy, cfg.aer_threshold))[:, None].expand_as(A)
        case "ecvgpo":
            A = ecvgpo_advantages(A, logprobs, mask, cfg.ecvgpo_power)
        case "vogue":
            n, T = divergence.shape[1:]
            visual = shaped_advantages(
                A[:, -n:], divergence, mask[:, -n:, :T], cfg.vogue_visual, cfg.vogue_cap
            )
            A = A + shaped_advantages(A, entropy, mask, cfg.vogue_entropy, cfg.vogue_cap)
            A[:, -n:] += visual
        case "top_entropy":
            keep = top_entropy_tokens(entropy, mask, cfg.top_entropy)
        case "clip_cov":
            keep = clip_cov_tokens(
                covariance(logprobs, A, mask), mask, cfg.cov_share, generator=generator
            )
        case "kl_cov":
            weights = kl_cov_weights(covariance(logprobs, A, mask), mask, **cov)
        case "sent":
            weights = sent_weights(logprobs, A, entropy, mask, **cov)
    return Treatment(keep, weights, A, bonus)


# ------------------------------------------------------------------------------------------------- order of the data


def semantic_entropy(
    answers: list[str | None], same: Callable[[str, str], bool] = str.__eq__
) -> float:
    """-sum_c p_c log p_c over clusters of equal answers, p_c a cluster's share.   nats; 0: all agree

    same(a, b): the reward's grader. An answer joins the first cluster whose first member it equals; the responses
    without an answer (None) are one cluster. Shares by count: ours (alternative: by the responses' probability).
    Raises ValueError without answers.
    """
    if not answers:
        raise ValueError("no answers to cluster")
    clusters: list[list[str | None]] = []
    for answer in answers:
        for cluster in clusters:
            first = cluster[0]
            if answer is first if None in (answer, first) else same(answer, first):
                cluster.append(answer)
                break
        else:
            clusters.append([answer])
    return (
        -sum(p * math.log(p) for p in (len(c) / len(answers) for c in clusters)) + 0.0
    )  # + 0.0: no -0.0


def curriculum(entropies: list[float], stages: int = 2) -> list[list[int]]:
    """The rows from low to high semantic entropy, cut in stages of equal size (the first ones get the remainder).

    SENT trains on one stage after the other, two in its public code. A stable order: equal rows stay as they were.
    """
    if not 1 <= stages <= len(entropies):
        raise ValueError(
            f"stages must be from 1 to the number of rows ({len(entropies)}), got {stages}"
        )
    order = sorted(range(len(entropies)), key=entropies.__getitem__)
    size, more = divmod(len(order), stages)
    ends = [size * i + min(i, more) for i in range(stages + 1)]
    return [order[a:b] for a, b in zip(ends, ends[1:], strict=False)]

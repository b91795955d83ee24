"""GRPO: group-relative policy optimisation, the update half of SaEI. Tensors in, tensors out.

What it computes
    A_i = (r_i - mean_group r) / (std_group r + 1e-6)        one advantage per response
    rho = pi(y_t) / pi_old(y_t)                              one ratio per token
    L   = -(1 / #tokens) sum_{i,t} min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i)

Where the rules come from
    paper  GRPO. SaEI's own variant is not known (a digest speaks of "KL divergence control").
    ours   The loss is a mean over all tokens of the optimiser step, not over responses, so no
           length is favoured. The clip is 0.2 / 0.28 (DAPO's clip-higher). The std divides by
           G - 1, as in TRL and verl. There is no KL term by default, and k3 when it is on. There is
           no entropy bonus, because it would confound every claim about entropy.
    known  Truncated importance weight, where another engine samples than the one that trains: TRL
           (vllm_importance_sampling_correction, per token, cap 3), verl (rollout_is, cap 2).

Symbols: P prompts, G responses per prompt, N = P * G, T tokens (padded), V vocabulary. In SaEI a
group holds the responses sampled on the clean image and those sampled on the attacked one. With one
update per batch and no KL the loss is near 0 in value, because rho = 1 and a group's advantages sum
to 0. Its gradient is not 0.

    advantages = group_advantages(torch.tensor([[1.0, 0.0, 0.0, 0.0]]))      # (P, G)
    # token_logprobs(logits[:, L-1:-1], tokens): a causal model's logits predict the next token
    logprobs = torch.full((4, 3), -1.0, requires_grad=True)
    mask = torch.ones(4, 3, dtype=torch.bool)
    loss, metrics = policy_loss(logprobs, logprobs.detach(), advantages.flatten(), mask)
    loss.backward()
"""

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, eps: float = 1e-6, scale: str = "std") -> Tensor:
    """A_i = (r_i - mean(r)) / (std(r) + eps), each prompt's group on its own.   (P, G) -> (P, G)

    std divides by G - 1 (G = 4 with one right answer: 1.50, not 1.73). scale "none" leaves the
    division out (Dr. GRPO). A group of equal rewards gets exactly zero by rule, because the float32
    rounding of its mean would otherwise be divided by itself.
    Raises ValueError for a shape other than (P, G >= 2) and for rewards that are not finite.
    """
    rewards = torch.as_tensor(rewards)
    rewards = rewards.to(torch.promote_types(rewards.dtype, torch.float32))  # from bool, int, half
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ValueError(f"rewards must be (P, G) with G >= 2, got {tuple(rewards.shape)}")
    if scale not in ("std", "none"):
        raise ValueError(f"scale must be 'std' or 'none', got {scale!r}")
    if not rewards.isfinite().all():
        group = int((~rewards.isfinite()).any(dim=1).nonzero()[0])
        raise ValueError(f"rewards are not finite in group {group}")
    centred = rewards - rewards.mean(dim=1, keepdim=True)  # (P, G)
    std = rewards.std(dim=1, keepdim=True, correction=1)  # (P, 1)
    advantages = centred / (std + eps) if scale == "std" else centred
    return advantages.masked_fill(equal_groups(rewards)[:, None], 0.0)


def equal_groups(rewards: Tensor) -> Tensor:
    """True where all G rewards of a group are equal: it teaches nothing.   (P, G) -> (P,) bool

    Call it on the accuracies. A format reward that differs would hide an all-wrong group.
    """
    return (rewards == rewards[:, :1]).all(dim=1)


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log softmax(logits / temperature)[token], in float32.   (N, T, V), (N, T) -> (N, T)

    temperature: that of sampling, or the ratio is not that of the policy that acted.
    """
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    return logp.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
    normalizer: float | Tensor | None = None,
    weights: Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """L = -(1 / normalizer) sum_{i,t} w min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i)

    (N, T), (N, T), (N,), (N, T) bool -> scalar, metrics. The sum is over the mask.

    normalizer: None is the number of response tokens here. With micro-batches or several processes,
        pass the number of the whole optimiser step, or the micro-batch size changes the gradient.
    weights: w (N, T), such as importance_weights; None is 1.
    metrics: clip/low and clip/high, the shares of tokens whose gradient the clip removes. They have
        the same denominator, so they add up over micro-batches.
    Raises ValueError for shapes that do not agree, another mask and a batch without a token.
    """
    same_shape = logprobs.shape == old_logprobs.shape == mask.shape
    if not same_shape or advantages.shape != mask.shape[:1]:
        raise ValueError(
            f"shapes do not agree: logprobs {tuple(logprobs.shape)}, "
            f"old_logprobs {tuple(old_logprobs.shape)}, advantages {tuple(advantages.shape)}, "
            f"mask {tuple(mask.shape)}"
        )
    normalizer = mask.sum() if normalizer is None else normalizer
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be torch.bool, got {mask.dtype}: pass mask.bool()")
    if normalizer <= 0:
        raise ValueError("no response token to average over")
    advantages = advantages.detach()[:, None]  # (N, 1)
    log_ratio = (logprobs - old_logprobs.detach()).masked_fill(~mask, 0.0)  # padding: ratio 1
    ratio = log_ratio.exp()  # (N, T)
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = torch.minimum(ratio * advantages, clipped * advantages)
    if weights is not None:
        surrogate = surrogate * weights.detach()
    loss = -surrogate.masked_fill(~mask, 0.0).sum() / normalizer
    with torch.no_grad():
        too_low = (ratio < 1 - clip_low) & (advantages < 0) & mask
        too_high = (ratio > 1 + clip_high) & (advantages > 0) & mask
        metrics = {"clip/low": too_low.sum() / normalizer, "clip/high": too_high.sum() / normalizer}
    return loss, metrics


@torch.no_grad()
def importance_weights(
    logprobs: Tensor, sampler_logprobs: Tensor, mask: Tensor, cap: float = 3.0
) -> tuple[Tensor, Tensor]:
    """w = min(rho, cap), rho = pi_trainer(y_t) / pi_sampler(y_t).   (N, T) each -> w, rho (N, T)

    For responses of an engine that computes pi in another way than the trainer, such as in another
    precision. Both log-probs are of the weights and the image that the response was sampled with.
    E[w A grad log pi] is then that of the trainer's policy, apart from the cap, which bounds the
    variance. Equal log-probs give 1, and padding too.
    """
    rho = (logprobs - sampler_logprobs).masked_fill(~mask, 0.0).exp()
    return rho.clamp(max=cap), rho


def kl_k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """k3 = exp(d) - d - 1, d = log pi_ref - log pi, unbiased for KL(pi || pi_ref).   -> (N, T)"""
    d = ref_logprobs - logprobs
    return d.exp() - d - 1

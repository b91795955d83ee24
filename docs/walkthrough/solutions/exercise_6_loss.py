import torch
from torch import Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    tokens: int,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Tensor:
    log_ratio = (logprobs - old_logprobs).masked_fill(~mask, 0.0)  # padding: no gradient
    ratio = log_ratio.exp()
    a = advantages[:, None]
    surrogate = torch.minimum(ratio * a, ratio.clamp(1 - clip_low, 1 + clip_high) * a)
    return -surrogate.masked_fill(~mask, 0.0).sum() / tokens

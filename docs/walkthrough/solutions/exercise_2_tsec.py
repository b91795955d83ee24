import torch
from torch import Tensor


def select_tokens(entropy: Tensor, mask: Tensor, low: float = 0.2, high: float = 0.8) -> Tensor:
    own = entropy.masked_fill(~mask, torch.nan)
    lower, upper = (own.nanquantile(q, dim=1, keepdim=True) for q in (low, high))  # (N, 1) each
    return mask & (entropy >= lower) & (entropy <= upper)

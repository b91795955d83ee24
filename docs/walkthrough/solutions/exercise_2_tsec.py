import torch
from torch import Tensor


def select_tokens(entropy: Tensor, mask: Tensor, low: float = 0.2, high: float = 0.8) -> Tensor:
    of_response = entropy.masked_fill(~mask, torch.nan)
    lower = of_response.nanquantile(low, dim=1, keepdim=True)  # (N, 1)
    upper = of_response.nanquantile(high, dim=1, keepdim=True)
    return mask & (entropy >= lower) & (entropy <= upper)

from collections.abc import Callable

import torch
from torch import Tensor


def log_ratios(
    logp: Callable[[Tensor, Tensor], Tensor],
    logp_old: Callable[[Tensor, Tensor], Tensor],
    condition: str,
    clean: Tensor,
    attacked: Tensor,
    tokens: Tensor,
    adversarial: Tensor,
    recorded: Tensor,
) -> Tensor:
    images = clean if condition == "clean" else torch.where(adversarial[:, None], attacked, clean)
    with torch.no_grad():
        # `recorded` would do for "sampled", and for the clean responses of "clean"
        old = logp_old(images, tokens)
    return logp(images, tokens) - old

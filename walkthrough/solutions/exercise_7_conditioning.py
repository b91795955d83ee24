import torch
from torch import Tensor


def log_ratios(logp, logp_old, condition, clean, attacked, tokens, adversarial, recorded) -> Tensor:
    images = clean if condition == "clean" else torch.where(adversarial[:, None], attacked, clean)
    with torch.no_grad():  # `recorded` would do for "sampled", and for the clean half
        old = logp_old(images, tokens)
    return logp(images, tokens) - old

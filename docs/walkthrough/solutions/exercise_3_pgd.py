import torch
from torch import Tensor


def linf_step(x: Tensor, x0: Tensor, grad: Tensor, step_size: float, eps: float) -> Tensor:
    x = x + step_size * grad.sign()
    x = torch.minimum(torch.maximum(x, x0 - eps), x0 + eps)
    return x.clamp(0.0, 1.0)

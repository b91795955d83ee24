"""Exercise 3 (step 3): one step of PGD with both projections.

x moves upward by step_size along the sign of the gradient. Then it goes back into the ball of
radius eps around the clean image x0, and into [0, 1].
"""

import torch
from torch import Tensor


def linf_step(x: Tensor, x0: Tensor, grad: Tensor, step_size: float, eps: float) -> Tensor:
    """x <- Proj(x + step_size * sign(grad)) onto {|x - x0| <= eps} and [0, 1].

    All (3, H, W). Returns a new tensor.
    """
    raise NotImplementedError


def check(linf_step) -> None:
    generator = torch.Generator().manual_seed(0)
    x0 = torch.rand(3, 8, 8, generator=generator)
    x0 = (1.2 * x0 - 0.1).clamp(0, 1)  # some values are 0 or 1
    grad = torch.randn(3, 8, 8, generator=generator) * 1e-3
    grad[:, 0] = 0.0
    eps, step_size = 8 / 255, 5 / 255
    x, before = x0.clone(), x0.clone()
    for _ in range(3):  # steps of 15/255 in all, in a ball of 8/255
        last, start = x, x.clone()
        x = linf_step(x, x0, grad, step_size, eps)
        assert torch.equal(last, start) and torch.equal(x0, before), "an argument was written to"
        low, high, change = x.min(), x.max(), (x - x0).abs().max()
        assert low >= 0 and high <= 1, f"the image left [0, 1]: {low:.3f} to {high:.3f}"
        assert change <= eps + 1e-6, f"{255 * change:.1f}/255 from the clean image"
        expected = (last + step_size * grad.sign()).clamp(0, 1)
        expected = expected.clamp(x0 - eps, x0 + eps)  # both are boxes: the order does not matter
        close = torch.allclose(x, expected, atol=1e-6)
        assert close, "not the projection of x + step_size * sign(grad)"
    assert (grad * (x - x0)).sum() > 0, "the step goes down"

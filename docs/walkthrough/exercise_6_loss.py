"""Exercise 6 (step 6): the clipped loss with one normaliser.

The optimiser step is split into micro-batches and over processes. Each of them calls this function
with the number of response tokens of the whole step. So the parts add up to what one batch gives.
Values at padding must not matter, for value and gradient. They may be anything, even infinite.
"""

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
    """L = -(1 / tokens) sum_{i,t} min(rho A_i, clip(rho, 1 - clip_low, 1 + clip_high) A_i)

    rho = exp(logprobs - old_logprobs). The sum is over response tokens.
    (N, T), (N, T), (N,), (N, T) bool -> scalar
    """
    raise NotImplementedError


def check(policy_loss) -> None:
    ratios = torch.tensor([[2.0, 0.5, 1.0], [2.0, 0.5, 9.0]])  # the last one is padding
    mask = torch.tensor([[True, True, True], [True, True, False]])
    advantages = torch.tensor([1.0, -1.0])
    logprobs, old = ratios.log().requires_grad_(), torch.zeros(2, 3)
    loss = policy_loss(logprobs, old, advantages, mask, 5)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    expected_loss = -(1.28 + 0.5 + 1.0 - 2.0 - 0.8) / 5
    error = abs(loss.item() - expected_loss)
    assert error < 1e-5, f"the loss is {expected_loss:.3f}, got {loss.item():.3f}"
    expected = torch.tensor([[0.0, -0.5, -1.0], [2.0, 0.0, 0.0]]) / 5
    close = torch.allclose(gradient, expected, atol=1e-6)
    assert close, f"-rho A / 5 where the clip does not bind, got {gradient}"

    total = 0.0
    for i in (slice(0, 1), slice(1, 2)):
        total = total + policy_loss(logprobs[i], old[i], advantages[i], mask[i], 5)
    assert torch.allclose(total, loss), "two micro-batches do not add up to the whole"

    for garbage in (float("nan"), float("inf"), -float("inf"), 1e4):
        dirty = ratios.log().masked_fill(~mask, garbage).requires_grad_()
        again = policy_loss(dirty, old, advantages, mask, 5)
        (gradient,) = torch.autograd.grad(again, dirty)
        assert torch.allclose(again, loss), f"{garbage} at padding changed the loss"
        close = torch.allclose(gradient, expected, atol=1e-6)
        assert close, f"{garbage} at padding changed the gradient"

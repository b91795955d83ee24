"""Exercise 1 (step 1): every token's entropy without ever holding all logits.

With 16 responses of 1,000 tokens and a vocabulary of 150,000, the logits alone are 9.6 GB in
float32. Autograd keeps more than one copy. Work through the rows `size` at a time. Let the backward
compute each chunk again (torch.utils.checkpoint.checkpoint). Value and gradient stay exact.

A banned token is left out of the distribution. It has probability 0. It adds 0 to the entropy and
to its gradient, although 0 * log 0 is NaN.
"""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def token_entropy(hidden: Tensor, head: Tensor, banned: Tensor, size: int) -> Tensor:
    """H_n = -sum_v p_n(v) log p_n(v) in nats, over the tokens v that are not banned.

    p_n = softmax(hidden_n @ head.T)
    hidden (N, D), head (V, D), banned (V,) bool -> (N,), differentiable in hidden
    """
    raise NotImplementedError


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(x, Tensor):
                self.numbers = max(self.numbers, x.numel())
        return out


def check(token_entropy) -> None:
    generator = torch.Generator().manual_seed(0)
    N, D, V, size = 12, 2, 50, 3
    hidden = torch.randn(N, D, generator=generator)
    head = torch.randn(V, D, generator=generator)
    banned = torch.arange(V) >= 45

    equal = token_entropy(torch.zeros(N, D), head, banned, size)
    assert equal.shape == (N,), f"one value per row, got {tuple(equal.shape)}"
    expected = torch.full((N,), math.log(45))
    assert torch.allclose(equal, expected), "45 equally likely tokens have log 45 nats"

    kept = []

    def keep(x: Tensor) -> Tensor:
        kept.append(x.numel())
        return x

    mine = hidden.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        entropy = token_entropy(mine, head, banned, size)
    assert entropy.requires_grad, "no gradient reaches hidden"
    (gradient,) = torch.autograd.grad(entropy.sum(), mine)

    plain = hidden.double().requires_grad_()
    expected = torch.distributions.Categorical(logits=plain @ head[~banned].double().T).entropy()
    (expected_gradient,) = torch.autograd.grad(expected.sum(), plain)
    close = torch.allclose(entropy.double(), expected, atol=1e-5)
    assert close, "not the entropy of the allowed tokens"
    assert gradient.isfinite().all(), "0 * log 0 made the gradient NaN"
    close = torch.allclose(gradient.double(), expected_gradient, atol=1e-5)
    assert close, "not the gradient of the plain entropy"

    with Largest() as largest:
        token_entropy(hidden, head, banned, size)
    found = largest.numbers
    assert found <= size * V, f"a tensor has {found} numbers, and a chunk {size * V}"
    found = sum(kept)
    assert found < N * V, (
        f"the graph keeps {found} numbers for the backward, all logits are {N * V}"
    )

"""Exercise 1 (step 1): every token's entropy without ever holding all logits.

With 16 responses of 1,000 tokens and a vocabulary of 150,000, the logits alone are 9.6 GB in float32, and autograd
keeps more than one copy. Work through the rows `size` at a time, and let the backward compute each chunk again
(torch.utils.checkpoint.checkpoint): value and gradient stay exact.

A banned token is left out of the distribution: it has probability 0 and adds 0 to the entropy and to its gradient,
although 0 * log 0 is NaN.
"""

import math

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


def token_entropy(hidden: Tensor, head: Tensor, banned: Tensor, size: int) -> Tensor:
    """H_n = -sum_v p_n(v) log p_n(v) in nats, p_n = softmax(hidden_n @ head.T) over the tokens that are not banned.

    hidden (N, D), head (V, D), banned (V,) bool -> (N,), differentiable in hidden
    """
    raise NotImplementedError


class Largest(TorchDispatchMode):
    """Notes the size of the largest tensor that any operation makes."""

    numbers = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else [out]:
            self.numbers = max(self.numbers, x.numel() if isinstance(x, Tensor) else 0)
        return out


def check(token_entropy) -> None:
    generator = torch.Generator().manual_seed(0)
    N, D, V, size = 12, 2, 50, 3
    hidden, head = (torch.randn(n, D, generator=generator) for n in (N, V))
    banned = torch.arange(V) >= 45

    equal = token_entropy(torch.zeros(N, D), head, banned, size)
    assert equal.shape == (N,), f"one value a row, got {tuple(equal.shape)}"
    assert torch.allclose(equal, torch.full((N,), math.log(45))), (
        "45 equally likely tokens have log 45 nats"
    )

    mine = hidden.clone().requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda x: kept.append(x.numel()) or x, lambda x: x
    ):
        entropy = token_entropy(mine, head, banned, size)
    assert entropy.requires_grad, "no gradient reaches hidden"
    (gradient,) = torch.autograd.grad(entropy.sum(), mine)

    plain = hidden.double().requires_grad_()
    expected = torch.distributions.Categorical(logits=plain @ head[~banned].double().T).entropy()
    (expected_gradient,) = torch.autograd.grad(expected.sum(), plain)
    assert torch.allclose(entropy.double(), expected, atol=1e-5), (
        "not the entropy of the allowed tokens"
    )
    assert gradient.isfinite().all(), "0 * log 0 made the gradient NaN"
    assert torch.allclose(gradient.double(), expected_gradient, atol=1e-5), (
        "the gradient differs from the plain one's"
    )

    with Largest() as largest:
        token_entropy(hidden, head, banned, size)
    assert largest.numbers <= size * V, (
        f"a tensor of {largest.numbers} numbers; a chunk has {size * V}"
    )
    assert sum(kept) < N * V, (
        f"the graph keeps {sum(kept)} numbers for the backward; all logits are {N * V}"
    )

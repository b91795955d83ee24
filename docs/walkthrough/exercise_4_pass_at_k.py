"""Exercise 4 (step 4): pass@k from n samples, without bias.

Whether attacked images widen what the policy finds is asked with pass@k: the chance that at least one of k responses is
right. From n >= k samples of which c are right, average over all subsets of k samples. The plug-in 1 - (1 - c/n)^k is
too low.
"""

from itertools import combinations

import torch


def pass_at_k(n: int, c: int, k: int) -> float:
    """The share of the subsets of k of n samples that hold at least one of the c right ones."""
    raise NotImplementedError


def check(pass_at_k) -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                expected = sum(map(any, subsets)) / len(subsets)
                assert abs(pass_at_k(n, c, k) - expected) < 1e-9, (
                    f"n={n}, c={c}, k={k}: {expected:.4f} of the subsets"
                )
    assert 0.6 < pass_at_k(2000, 2, 1000) < 0.9, "large n: no overflow"
    p, n, k = 0.2, 8, 4  # unbiased: its mean over draws is the true 1 - (1 - p)^k
    rights = (
        torch.distributions.Binomial(n, torch.tensor(p))
        .log_prob(torch.arange(n + 1.0))
        .exp()
        .tolist()
    )
    mean = sum(weight * pass_at_k(n, c, k) for c, weight in enumerate(rights))
    assert abs(mean - (1 - (1 - p) ** k)) < 1e-5, "biased"

"""Exercise 4 (step 4): pass@k from n samples, without bias.

Do attacked images widen what the policy finds? pass@k is the chance that at least one of k
responses is right. From n >= k samples of which c are right, average over all subsets of k samples.
The plug-in estimate 1 - (1 - c/n)^k is too low.
"""

from itertools import combinations
from math import comb


def pass_at_k(n: int, c: int, k: int) -> float:
    """The share of the subsets of k of n samples that hold at least one of the c right ones."""
    raise NotImplementedError


def check(pass_at_k) -> None:
    for n in range(1, 8):
        for c in range(n + 1):
            for k in range(1, n + 1):
                subsets = list(combinations([True] * c + [False] * (n - c), k))
                expected = sum(any(subset) for subset in subsets) / len(subsets)
                error = abs(pass_at_k(n, c, k) - expected)
                assert error < 1e-9, f"n={n}, c={c}, k={k}: {expected:.4f} of the subsets"
    assert 0.6 < pass_at_k(2000, 2, 1000) < 0.9, "large n: no overflow"
    p, n, k = 0.2, 8, 4  # unbiased: its mean over draws is the true 1 - (1 - p)^k
    mean = 0.0
    for c in range(n + 1):
        mean += comb(n, c) * p**c * (1 - p) ** (n - c) * pass_at_k(n, c, k)
    assert abs(mean - (1 - (1 - p) ** k)) < 1e-9, "biased"

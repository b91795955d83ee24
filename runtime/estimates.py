"""Estimates from the answers to n problems, with 95% intervals: pass@k, shares, differences.

A problem is one observation, however many responses were sampled for it. So responses to one
problem may be alike without making an interval too narrow. The intervals are about other problems.
They do not cover other seeds. docs/metrics.md states the formulas.
"""

import numpy as np

Z = 1.96  # 97.5% quantile of the normal distribution


def pass_at_k(n: int, c: int, k: int) -> float:
    """1 - C(n - c, k) / C(n, k): chance that k of n samples hold a right one, c of n being right.

    The k are drawn without replacement. Raises ValueError unless 0 <= c <= n and 1 <= k <= n.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"needs 0 <= c <= n and 1 <= k <= n, got n={n}, c={c}, k={k}")
    return 1.0 - float(np.prod([(n - c - i) / (n - i) for i in range(k)]))


def bootstrap_interval(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> tuple:
    """2.5% and 97.5% percentile of the mean of `values` resampled with replacement.   (n,) -> 2"""
    rng, n = np.random.default_rng(seed), len(values)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(resamples)]
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def normal_interval(values: np.ndarray, weights: np.ndarray) -> tuple[float, float]:
    """Weighted mean -+ Z sqrt(weighted variance / sum of the weights).   (n,) (n,) -> 2"""
    middle = np.average(values, weights=weights)
    variance = np.average((values - middle) ** 2, weights=weights)
    half = Z * np.sqrt(variance / weights.sum())
    return float(middle - half), float(middle + half)


def share_interval(values: np.ndarray) -> tuple[float, float]:
    """Of the mean of values in [0, 1]; of 8 ones it is [0.62, 1].   (n,) -> 2

    Agresti and Coull's "plus four" interval: two problems of value 1 and two of value 0 are added.
    A value is a problem's share of right responses, so this is also the clustered interval.
    """
    low, high = normal_interval(np.append(values, [1, 1, 0, 0]), np.ones(len(values) + 4))
    return max(low, 0.0), min(high, 1.0)


def share_difference_interval(differences: np.ndarray) -> tuple[float, float]:
    """Of the mean of paired differences in [-1, 1], one per problem.   (n,) -> 2

    Agresti and Min's interval: half a problem is added for each of 1 - 1, 0 - 0, 1 - 0 and 0 - 1.
    """
    values = np.append(differences, [0, 0, 1, -1])
    weights = np.append(np.ones(len(differences)), [0.5] * 4)
    low, high = normal_interval(values, weights)
    return max(low, -1.0), min(high, 1.0)

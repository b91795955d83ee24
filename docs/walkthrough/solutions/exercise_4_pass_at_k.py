from math import prod


def pass_at_k(n: int, c: int, k: int) -> float:
    # C(n - c, k) / C(n, k), factor by factor
    return 1.0 - prod((n - c - i) / (n - i) for i in range(k))

from math import prod


def pass_at_k(n: int, c: int, k: int) -> float:
    return 1.0 - prod(
        (n - c - i) / (n - i) for i in range(k)
    )  # C(n - c, k) / C(n, k), factor by factor

"""Exercise 5 (step 5): advantages within the group of one prompt.

A_i = (r_i - mean) / (std + eps), where the std divides by G - 1. A group of equal rewards teaches
nothing: its advantages are exactly zero, whatever the rounding of its mean.
"""

import statistics

import torch
from torch import Tensor


def group_advantages(rewards: Tensor, eps: float = 1e-6) -> Tensor:
    """(P, G) -> (P, G), a new tensor"""
    raise NotImplementedError


def check(group_advantages) -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.1, 1.0, 0.1, 0.0], [0.9, 0.9, 1.0, 0.0]])
    before = rewards.clone()
    advantages = group_advantages(rewards)
    assert torch.equal(rewards, before), "the argument was written to"
    assert advantages.shape == rewards.shape
    for row, found in zip(rewards.tolist(), advantages.tolist(), strict=True):
        mean, std = statistics.mean(row), statistics.stdev(row)
        expected = [(r - mean) / (std + 1e-6) for r in row]
        error = max(abs(a - b) for a, b in zip(found, expected, strict=True))
        assert error < 1e-4, f"{row}: expected {expected}"
    for value in (0.1, 0.7, 1.1, 1e-3, 1234.567):
        for G in range(2, 20):
            largest = group_advantages(torch.full((1, G), value)).abs().max()
            assert largest == 0, f"{G} rewards of {value} are equal, an advantage is {largest:.3g}"

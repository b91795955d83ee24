"""runtime/estimates.py: intervals against published values, exact coverage and each other."""

import itertools
import math

import numpy as np
import pytest

from runtime.estimates import bootstrap_interval, share_difference_interval, share_interval


def ones_of(right: int, n: int) -> np.ndarray:
    return np.array([1.0] * right + [0.0] * (n - right))


@pytest.mark.parametrize(
    "right, n, low, high",
    [(8, 8, 0.6225, 1.0), (0, 8, 0.0, 0.3775), (4, 8, 0.2171, 0.7829), (0, 500, 0.0, 0.0095)],
)
def test_share_interval_is_the_plus_four_interval(right, n, low, high):
    p = (right + 2) / (n + 4)
    half = 1.96 * math.sqrt(p * (1 - p) / (n + 4))
    found = share_interval(ones_of(right, n))
    assert found == pytest.approx((max(p - half, 0), min(p + half, 1)))
    assert found == pytest.approx((low, high), abs=1e-3)


@pytest.mark.parametrize("n, p", [(8, 0.5), (8, 0.9), (40, 0.97), (200, 0.3)])
def test_share_interval_covers_95_percent(n, p):
    covered = 0.0
    for right in range(n + 1):
        low, high = share_interval(ones_of(right, n))
        if low <= p <= high:
            covered += math.comb(n, right) * p**right * (1 - p) ** (n - right)
    assert covered > 0.925


def test_many_problems_give_the_bootstraps_interval():
    rng = np.random.default_rng(0)
    before, after = rng.binomial(8, [[0.3], [0.5]], (2, 2000)) / 8
    assert share_interval(before) == pytest.approx(bootstrap_interval(before), abs=2e-3)
    found = share_difference_interval(after - before)
    assert found == pytest.approx(bootstrap_interval(after - before), abs=2e-3)


def test_samples_of_one_problem_are_one_observation():
    """8 equal samples say no more than one. Samples that differ inside a problem narrow it."""
    all_or_none = np.repeat([1.0, 0.0], 50)
    low, high = share_interval(all_or_none)
    assert (low, high) == pytest.approx(share_interval(ones_of(50, 100)))
    narrow_low, narrow_high = share_interval(np.full(100, 0.5))
    assert low < narrow_low < 0.5 < narrow_high < high


@pytest.mark.parametrize("n", [1, 8, 500])
@pytest.mark.parametrize("value", [0.0, 0.3, 0.95, 1.0])
def test_equal_values_have_an_interval_that_holds_them(n, value):
    low, high = share_interval(np.full(n, value))
    assert 0 <= low <= value <= high <= 1 and high - low > 0.001
    low, high = share_difference_interval(np.full(n, value))
    assert low <= value <= high <= 1 and high - low > 0.001


def test_difference_interval_is_agresti_and_mins():
    """(b - c) / N of the counts 1-0 and 0-1, each cell of the 2 x 2 table raised by 1/2."""
    for gained, lost, same in itertools.product((0, 3, 10), (0, 4), (1, 20)):
        differences = np.array([1.0] * gained + [-1.0] * lost + [0.0] * same)
        b, c, n = gained + 0.5, lost + 0.5, len(differences) + 2
        middle = (b - c) / n
        half = 1.96 * math.sqrt((b + c) - (b - c) ** 2 / n) / n
        expected = max(middle - half, -1), min(middle + half, 1)
        assert share_difference_interval(differences) == pytest.approx(expected)

"""tsec.py: the entropy against torch.distributions and TRL, the choice against a loop over numpy.quantile.

Tests named test_trap_NN guard against a failure seen in other projects.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributions import Categorical
from trl.trainer.utils import entropy_from_logits

from tsec import entropy_quantile, select_tokens, selective_entropy, token_entropy

VALUE, GRADIENT = {"atol": 1e-6, "rtol": 1e-5}, {"atol": 1e-6, "rtol": 1e-4}  # float32 rounding


def random_logits(*shape: int, scale: float = 3.0, seed: int = 0) -> torch.Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def value_and_gradient(entropy, logits, weights):
    """entropy(logits) and the gradient of its weighted sum: equal weights would hide a wrong pairing of tokens."""
    logits = logits.clone().requires_grad_()
    value = entropy(logits)
    (gradient,) = torch.autograd.grad((value * weights).sum(), logits)
    return value.detach(), gradient


def assert_same_entropy(logits, temperature=1.0, gradient_tolerance=GRADIENT):
    """Value and gradient against torch.distributions in double precision."""
    weights = random_logits(*logits.shape[:-1], seed=1)
    value, gradient = value_and_gradient(lambda x: token_entropy(x, temperature), logits, weights)
    expected, expected_gradient = value_and_gradient(
        lambda x: Categorical(logits=x / temperature).entropy(), logits.double(), weights.double()
    )
    assert value.dtype == torch.float32 and gradient.dtype == logits.dtype
    torch.testing.assert_close(value.double(), expected, **VALUE)
    torch.testing.assert_close(gradient.double(), expected_gradient, **gradient_tolerance)


# -------------------------------------------------------------------------------------------------------- token_entropy


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_entropy_of_equal_logits_is_log_n(n):
    torch.testing.assert_close(
        token_entropy(torch.full((2, 3, n), 5.0)), torch.full((2, 3), math.log(n)), **VALUE
    )


def test_entropy_of_two_tokens():
    p = torch.tensor([0.5, 0.9, 0.99])
    logits = torch.stack([p.log(), (1 - p).log()], dim=-1)
    expected = -(p * p.log() + (1 - p) * (1 - p).log())
    torch.testing.assert_close(token_entropy(logits), expected, **VALUE)


@pytest.mark.parametrize("shape", [(11,), (4, 11), (2, 3, 50), (2, 3, 4, 5)])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_entropy_and_gradient_equal_torch_distributions(shape, temperature):
    assert_same_entropy(random_logits(*shape), temperature)


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_entropy_of_bfloat16_logits_is_computed_in_float32(temperature):
    """Only the gradient, handed back in bfloat16, is rounded (8 bits)."""
    assert_same_entropy(
        random_logits(4, 5, 300).bfloat16(), temperature, {"atol": 1e-5, "rtol": 2**-8}
    )


def test_entropy_equals_trl():
    logits = random_logits(3, 5, 40)
    weights = random_logits(3, 5, seed=1)
    ours = value_and_gradient(token_entropy, logits, weights)
    torch.testing.assert_close(
        ours, value_and_gradient(entropy_from_logits, logits, weights), **VALUE
    )


def test_entropy_passes_gradcheck():
    """By finite differences, which know no formula (of float32 values, hence the coarse step)."""
    logits = random_logits(3, 6, scale=1.0).double().requires_grad_()
    assert torch.autograd.gradcheck(token_entropy, (logits,), eps=1e-2, atol=1e-3, rtol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("banned", [[0], [3, 4, 9], list(range(1, 10))])
def test_banned_tokens_count_as_absent(banned, dtype):
    """-inf logits: value and gradient are finite and those of the distribution without these entries."""
    logits = random_logits(2, 5, 10).to(dtype)
    allowed = [v for v in range(10) if v not in banned]
    logits[..., banned] = -torch.inf
    weights = random_logits(2, 5, seed=1)
    value, gradient = value_and_gradient(lambda x: token_entropy(x, 0.8), logits, weights)
    expected, expected_gradient = value_and_gradient(
        lambda x: Categorical(logits=x / 0.8).entropy(),
        logits[..., allowed].double(),
        weights.double(),
    )
    torch.testing.assert_close(value.double(), expected, **VALUE)
    tolerance = GRADIENT if dtype == torch.float32 else {"atol": 1e-5, "rtol": 2**-8}
    torch.testing.assert_close(gradient[..., allowed].double(), expected_gradient, **tolerance)
    assert (gradient[..., banned] == 0).all()


def test_entropy_of_a_certain_policy_is_zero_and_its_gradient_finite():
    """Logits 1,000 apart: the other probabilities underflow to 0."""
    logits = torch.tensor([[1000.0, 0.0, -1000.0]])
    value, gradient = value_and_gradient(token_entropy, logits, torch.ones(1))
    assert value.item() == 0.0 and (gradient == 0).all()


def test_entropy_does_not_depend_on_a_constant_and_leaves_its_argument_alone():
    logits = random_logits(4, 9)
    before = logits.clone()
    torch.testing.assert_close(token_entropy(logits + 7.0), token_entropy(logits), **VALUE)
    assert torch.equal(logits, before)


# -------------------------------------------------------------------------------------- entropy_quantile, select_tokens


def numpy_quantile(values: np.ndarray, q: float) -> np.float32:
    return np.quantile(values.astype(np.float64), q).astype(np.float32)


def select_by_loop(
    entropy: np.ndarray, mask: np.ndarray, low: float, high: float, scope: str
) -> list[list[bool]]:
    """One token at a time, over numpy quantiles."""
    keep = []
    for row, row_mask in zip(entropy, mask, strict=True):
        pool = row[row_mask] if scope == "response" else entropy[mask]
        lower, upper = (numpy_quantile(pool, q) if len(pool) else np.nan for q in (low, high))
        keep.append([bool(on and lower <= h <= upper) for h, on in zip(row, row_mask, strict=True)])
    return keep


@st.composite
def ragged_entropies(draw):
    """(N, T) entropies with ties, and a mask: prefixes of any length, 0 included, or holes anywhere."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    few = st.sampled_from([0.0, 0.25, 0.5, 2.0])  # ties
    value = draw(
        st.sampled_from([few, st.floats(0, 12, width=32, allow_subnormal=False), st.just(1.0)])
    )
    entropy = draw(st.lists(value, min_size=rows * length, max_size=rows * length))
    if draw(st.booleans()):
        mask = [
            [t < n for t in range(length)]
            for n in draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
        ]
    else:
        mask = draw(st.lists(st.booleans(), min_size=rows * length, max_size=rows * length))
    return np.array(entropy, np.float32).reshape(rows, length), np.array(mask, bool).reshape(
        rows, length
    )


percent = st.integers(0, 100).map(lambda p: p / 100)
cuts = st.tuples(percent, percent).filter(lambda c: c[0] != c[1]).map(sorted)


@settings(max_examples=150, deadline=None)
@given(ragged_entropies(), cuts, st.sampled_from(["response", "batch"]))
def test_choice_equals_a_loop_over_numpy_quantiles(data, cuts, scope):
    entropy, mask = data
    expected = select_by_loop(entropy, mask, *cuts, scope)
    keep = select_tokens(torch.tensor(entropy), torch.tensor(mask), *cuts, scope)
    assert keep.dtype == torch.bool and keep.tolist() == expected
    extreme = select_tokens(torch.tensor(entropy), torch.tensor(mask), *cuts, scope, "extreme")
    assert extreme.tolist() == (mask & ~np.array(expected)).tolist()


@settings(max_examples=100, deadline=None)
@given(ragged_entropies(), percent, st.sampled_from(["response", "batch"]))
def test_quantiles_equal_numpy(data, q, scope):
    entropy, mask = data
    pools = [
        row[on] if scope == "response" else entropy[mask]
        for row, on in zip(entropy, mask, strict=True)
    ]
    expected = [numpy_quantile(pool, q) if len(pool) else np.nan for pool in pools]
    quantile = entropy_quantile(torch.tensor(entropy), torch.tensor(mask), q, scope)
    assert quantile.dtype == torch.float32
    np.testing.assert_allclose(quantile.numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize("q", [0.2, 0.35, 0.8])
def test_quantiles_of_bfloat16_entropies_are_rounded_once(q):
    """Interpolated in double precision: the difference of two neighbours need not fit bfloat16."""
    entropy = random_logits(200, 6).abs().bfloat16()
    expected = np.quantile(entropy.double().numpy(), q, axis=1)
    quantile = entropy_quantile(entropy, torch.ones(200, 6, dtype=torch.bool), q)
    assert torch.equal(quantile, torch.from_numpy(expected).bfloat16())


def test_default_cuts_drop_both_tails_of_each_response():
    """Eleven tokens: the 20% and the 80% quantile are the third and the ninth, and the cuts are inclusive."""
    entropy = torch.stack([torch.arange(11.0), torch.arange(11.0).flip(0) * 100])
    keep = select_tokens(entropy, torch.ones(2, 11, dtype=torch.bool))
    assert keep.tolist() == [[2 <= t <= 8 for t in range(11)]] * 2


def test_batch_scope_pools_the_responses():
    """A response of low entropies goes as a whole where the other responses hold the high ones."""
    entropy = torch.stack([torch.arange(5.0), 100 + torch.arange(5.0)])
    mask = torch.ones(2, 5, dtype=torch.bool)
    assert select_tokens(entropy, mask, 0.5, 1.0, "batch").tolist() == [[False] * 5, [True] * 5]
    assert select_tokens(entropy, mask, 0.5, 1.0).tolist() == [[False, False, True, True, True]] * 2


@pytest.mark.parametrize("scope", ["response", "batch"])
@settings(max_examples=50, deadline=None)
@given(data=ragged_entropies())
def test_cuts_zero_and_one_keep_every_token(scope, data):
    entropy, mask = data
    assert (
        select_tokens(torch.tensor(entropy), torch.tensor(mask), 0.0, 1.0, scope).tolist()
        == mask.tolist()
    )


def test_short_responses():
    """One token is kept; of two different ones none, of two equal ones both; of no token none."""
    entropy = torch.tensor([[0.7, 9.0], [0.1, 0.2], [0.3, 0.3], [0.5, 0.5]])
    mask = torch.tensor([[True, False], [True, True], [True, True], [False, False]])
    expected = [[True, False], [False, False], [True, True], [False, False]]
    assert select_tokens(entropy, mask).tolist() == expected


@pytest.mark.parametrize(("q", "n"), [(0.2, 15), (0.07, 100), (0.14, 50), (0.28, 25), (0.29, 100)])
def test_a_cut_that_falls_on_a_token_keeps_it(q, n):
    """0.14 * 50 is 7.000000000000001 and 0.29 * 100 28.999999999999996: no token drops out by rounding."""
    entropy, mask = random_logits(1, n + 1).abs(), torch.ones(1, n + 1, dtype=torch.bool)
    token = entropy.argsort(dim=1)[0, round(q * n)]
    assert select_tokens(entropy, mask, low=q, high=1.0)[0, token]
    assert select_tokens(entropy, mask, low=0.0, high=q)[0, token]


@pytest.mark.parametrize("scope", ["response", "batch"])
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, -5.0])
def test_padding_may_hold_anything(scope, garbage):
    entropy = random_logits(3, 8).abs()
    mask = torch.arange(8) < torch.tensor([[8], [5], [0]])
    padded = entropy.masked_fill(~mask, garbage)
    keep = select_tokens(padded, mask, scope=scope)
    assert (
        torch.equal(keep, select_tokens(entropy, mask, scope=scope))
        and not keep[~mask].any()
        and keep.any()
    )


def test_choice_carries_no_gradient():
    """d objective / d H_t is 1 / |kept| at a kept token and exactly 0 elsewhere: no path through the cuts."""
    entropy = random_logits(2, 11).abs().requires_grad_()
    keep = select_tokens(entropy, torch.ones(2, 11, dtype=torch.bool))
    assert not keep.requires_grad
    (gradient,) = torch.autograd.grad(selective_entropy(entropy, keep).sum(), entropy)
    torch.testing.assert_close(gradient, keep / keep.sum(dim=1, keepdim=True))


def test_choice_leaves_its_arguments_alone():
    entropy, mask = random_logits(2, 6).abs(), torch.arange(6) < torch.tensor([[6], [3]])
    before = entropy.clone(), mask.clone()
    select_tokens(entropy, mask), selective_entropy(entropy, mask)
    assert torch.equal(entropy, before[0]) and torch.equal(mask, before[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"mask": torch.ones(2, 4, dtype=torch.bool)},
            r"must be \(N, T\), got \(2, 3\) and \(2, 4\)",
        ),
        ({"mask": torch.ones(2, 3)}, "torch.float32"),
        ({"mask": torch.ones(2, 3, dtype=torch.long)}, "torch.int64"),
        (
            {"entropy": torch.ones(3), "mask": torch.ones(3, dtype=torch.bool)},
            r"must be \(N, T\), got \(3,\)",
        ),
        ({"low": 0.8, "high": 0.2}, "low=0.8, high=0.2"),
        ({"low": 0.5, "high": 0.5}, "0 <= low < high <= 1"),
        ({"low": -0.1}, "low=-0.1"),
        ({"high": 20}, "high=20"),
        ({"low": math.nan}, "low=nan"),
        ({"scope": "group"}, "'response' or 'batch', got 'group'"),
        ({"which": "low"}, "'moderate' or 'extreme', got 'low'"),
        ({"entropy": torch.tensor([[1.0, torch.nan, 1.0]] * 2)}, "NaN"),
    ],
)
def test_select_tokens_refuses(change, message):
    arguments = {"entropy": torch.ones(2, 3), "mask": torch.ones(2, 3, dtype=torch.bool)} | change
    with pytest.raises(ValueError, match=message):
        select_tokens(**arguments)


# ---------------------------------------------------------------------------------------------------- selective_entropy


def test_selective_entropy_is_the_mean_over_each_responses_kept_tokens():
    entropy = torch.tensor([[1.0, 2.0, 6.0], [3.0, 5.0, 7.0], [9.0, 9.0, 9.0]])
    keep = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    assert selective_entropy(entropy, keep).tolist() == [3.5, 5.0, 0.0]


def test_a_response_without_kept_tokens_has_no_gradient():
    entropy = torch.ones(2, 3, requires_grad=True)
    keep = torch.tensor([[True, True, False], [False, False, False]])
    (gradient,) = torch.autograd.grad(selective_entropy(entropy, keep).sum(), entropy)
    assert gradient.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_garbage_at_dropped_tokens_changes_neither_value_nor_gradient(garbage):
    entropy, keep = random_logits(3, 5).abs(), torch.tensor([[True, True, False, False, True]] * 3)
    dirty = entropy.masked_fill(~keep, garbage)
    weights = torch.tensor([1.0, 2.0, 3.0])
    ours = value_and_gradient(lambda x: selective_entropy(x, keep), dirty, weights)
    assert ours[0].isfinite().all() and ours[1].isfinite().all()
    torch.testing.assert_close(
        ours, value_and_gradient(lambda x: selective_entropy(x, keep), entropy, weights)
    )


def test_trap_11_the_end_token_counts_when_it_equals_padding():
    """A mask from positions: the choice sees no token values, so an end token with the padding's id stays."""
    eos = pad = 0
    tokens = torch.tensor([[5, 7, 6, eos, pad, pad]])
    mask = (
        torch.arange(6) < (tokens != pad).sum(dim=1, keepdim=True) + 1
    )  # the first eos is part of the response
    keep = select_tokens(torch.tensor([[0.0, 5.0, 1.0, 2.0, 2.0, 2.0]]), mask, low=0.2, high=0.8)
    assert keep.tolist() == [[False, False, True, True, False, False]]

"""tsec.py: entropies against torch.distributions and TRL, the choice against numpy's quantiles.

Tests named test_trap_NN guard against a failure seen in other projects.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.distributions import Categorical
from trl.trainer.utils import entropy_from_logits

from tsec import entropy_quantile, select_tokens, selective_entropy, token_entropy

VALUE, GRADIENT = {"atol": 1e-6, "rtol": 1e-5}, {"atol": 1e-6, "rtol": 1e-4}  # float32 rounding
BFLOAT16 = {"atol": 1e-5, "rtol": 2**-8}  # a gradient handed back in 8 bits
SCOPES = ["response", "batch"]


def random_logits(*shape: int, scale: float = 3.0, seed: int = 0) -> Tensor:
    return scale * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_entropies(*shape: int) -> Tensor:
    return random_logits(*shape).abs()


def all_tokens(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.bool)


def value_and_gradient(function, x: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """function(x), the gradient of its weighted sum. Equal weights would hide wrong pairings."""
    x = x.clone().requires_grad_()
    value = function(x)
    return value.detach(), torch.autograd.grad((value * weights).sum(), x)[0]


def exact_entropy(logits: Tensor, temperature: float, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Value and gradient by torch.distributions in double precision."""

    def entropy(x: Tensor) -> Tensor:
        return Categorical(logits=x / temperature).entropy()

    return value_and_gradient(entropy, logits.double(), weights.double())


# -------------------------------------------------------------------------------- token_entropy


@pytest.mark.parametrize("n", [1, 2, 7, 1000])
def test_entropy_of_equal_logits_is_log_n(n):
    entropy = token_entropy(torch.full((2, 3, n), 5.0))
    torch.testing.assert_close(entropy, torch.full((2, 3), math.log(n)), **VALUE)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, GRADIENT), (torch.bfloat16, BFLOAT16)]
)
@pytest.mark.parametrize("shape", [(11,), (2, 3, 50), (4, 5, 300), (2, 3, 4, 5)])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_entropy_and_gradient_equal_torch_distributions(shape, temperature, dtype, tolerance):
    """In float32 whatever the logits' type. Only the gradient is rounded to that type."""
    logits, weights = random_logits(*shape).to(dtype), random_logits(*shape[:-1], seed=1)
    value, gradient = value_and_gradient(lambda x: token_entropy(x, temperature), logits, weights)
    expected, expected_gradient = exact_entropy(logits, temperature, weights)
    assert value.dtype == torch.float32 and gradient.dtype == dtype
    torch.testing.assert_close(value.double(), expected, **VALUE)
    torch.testing.assert_close(gradient.double(), expected_gradient, **tolerance)


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, GRADIENT), (torch.bfloat16, BFLOAT16)]
)
@pytest.mark.parametrize("banned", [[0], [3, 4, 9], list(range(1, 10))])
def test_banned_tokens_count_as_absent(banned, dtype, tolerance):
    """-inf logits: value and gradient are those of the distribution without these entries."""
    logits, weights = random_logits(2, 5, 10).to(dtype), random_logits(2, 5, seed=1)
    allowed = [v for v in range(10) if v not in banned]
    logits[..., banned] = -torch.inf
    value, gradient = value_and_gradient(lambda x: token_entropy(x, 0.8), logits, weights)
    expected, expected_gradient = exact_entropy(logits[..., allowed], 0.8, weights)
    torch.testing.assert_close(value.double(), expected, **VALUE)
    torch.testing.assert_close(gradient[..., allowed].double(), expected_gradient, **tolerance)
    assert (gradient[..., banned] == 0).all()


def test_entropy_equals_trl():
    logits, weights = random_logits(3, 5, 40), random_logits(3, 5, seed=1)
    ours = value_and_gradient(token_entropy, logits, weights)
    trl = value_and_gradient(entropy_from_logits, logits, weights)
    torch.testing.assert_close(ours, trl, **VALUE)


def test_entropy_passes_gradcheck():
    """Finite differences, which know no formula (of float32 values, hence the coarse step)."""
    logits = random_logits(3, 6, scale=1.0).double().requires_grad_()
    assert torch.autograd.gradcheck(token_entropy, (logits,), eps=1e-2, atol=1e-3, rtol=1e-2)


def test_entropy_of_a_certain_policy_is_zero_and_its_gradient_finite():
    """Logits 1,000 apart: the other probabilities underflow to 0."""
    logits = torch.tensor([[1000.0, 0.0, -1000.0]])
    value, gradient = value_and_gradient(token_entropy, logits, torch.ones(1))
    assert value.item() == 0.0 and (gradient == 0).all()


def test_entropy_does_not_depend_on_a_constant():
    logits = random_logits(4, 9)
    torch.testing.assert_close(token_entropy(logits + 7.0), token_entropy(logits), **VALUE)


# -------------------------------------------------------------- entropy_quantile, select_tokens


def numpy_quantile(values: np.ndarray, q: float) -> float:
    """Of float32 values, interpolated in double precision. NaN without values."""
    return float(np.float32(np.quantile(values.astype(np.float64), q))) if len(values) else math.nan


def pools(entropy: np.ndarray, mask: np.ndarray, scope: str) -> list[np.ndarray]:
    """The entropies that each response's quantiles are taken over."""
    if scope == "batch":
        return [entropy[mask]] * len(entropy)
    return [row[row_mask] for row, row_mask in zip(entropy, mask, strict=True)]


@st.composite
def ragged_entropies(draw):
    """(N, T) entropies with ties, and a mask: prefixes of any length, 0 included, or holes."""
    rows, length = draw(st.integers(1, 4)), draw(st.integers(1, 9))
    tied = st.sampled_from([0.0, 0.25, 0.5, 2.0])
    value = draw(st.sampled_from([tied, st.floats(0, 12, width=32, allow_subnormal=False)]))
    size = rows * length
    entropy = draw(st.lists(value, min_size=size, max_size=size))
    if draw(st.booleans()):
        lengths = draw(st.lists(st.integers(0, length), min_size=rows, max_size=rows))
        mask = np.arange(length) < np.array(lengths)[:, None]
    else:
        mask = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    shape = (rows, length)
    return np.array(entropy, np.float32).reshape(shape), np.array(mask, bool).reshape(shape)


percent = st.integers(0, 100).map(lambda p: p / 100)
cuts = st.tuples(percent, percent).filter(lambda pair: pair[0] != pair[1]).map(sorted)


@settings(max_examples=100, deadline=None)
@given(ragged_entropies(), cuts, st.sampled_from(SCOPES))
def test_choice_and_quantiles_equal_a_loop_over_numpys(data, cuts, scope):
    entropy, mask = data
    tensors = torch.tensor(entropy), torch.tensor(mask)
    expected, quantiles = [], []
    for row, row_mask, pool in zip(entropy, mask, pools(entropy, mask, scope), strict=True):
        low, high = numpy_quantile(pool, cuts[0]), numpy_quantile(pool, cuts[1])
        expected.append((row_mask & (low <= row) & (row <= high)).tolist())
        quantiles.append([low, high])
    found = [entropy_quantile(*tensors, q, scope) for q in cuts]
    assert found[0].dtype == torch.float32
    np.testing.assert_allclose(torch.stack(found, dim=1), quantiles, rtol=1e-6)
    chosen = select_tokens(*tensors, *cuts, scope)
    assert chosen.dtype == torch.bool and chosen.tolist() == expected
    extreme = select_tokens(*tensors, *cuts, scope, "extreme")
    assert torch.equal(extreme, tensors[1] & ~chosen)
    assert torch.equal(select_tokens(*tensors, 0.0, 1.0, scope), tensors[1])  # every token


@pytest.mark.parametrize("q", [0.2, 0.35, 0.8])
def test_quantiles_of_bfloat16_entropies_are_rounded_once(q):
    """Interpolated in double precision: a difference of neighbours need not fit bfloat16."""
    entropy = random_entropies(200, 6).bfloat16()
    expected = torch.tensor(np.quantile(entropy.double().numpy(), q, axis=1)).bfloat16()
    assert torch.equal(entropy_quantile(entropy, all_tokens(200, 6), q), expected)


def test_default_cuts_drop_both_tails_of_each_response():
    """Of eleven tokens the cuts are the third and the ninth, inclusive."""
    entropy = torch.stack([torch.arange(11.0), torch.arange(11.0).flip(0) * 100])
    chosen = select_tokens(entropy, all_tokens(2, 11))
    assert chosen.tolist() == [[2 <= t <= 8 for t in range(11)]] * 2


def test_batch_scope_pools_the_responses():
    """A response of low entropies goes as a whole where the other one holds the high ones."""
    entropy = torch.stack([torch.arange(5.0), 100 + torch.arange(5.0)])
    pooled = select_tokens(entropy, all_tokens(2, 5), 0.5, 1.0, "batch")
    assert pooled.tolist() == [[False] * 5, [True] * 5]
    alone = select_tokens(entropy, all_tokens(2, 5), 0.5, 1.0)
    assert alone.tolist() == [[False, False, True, True, True]] * 2


def test_short_responses():
    """One token is kept. Of two different ones none, of two equal ones both, of no token none."""
    entropy = torch.tensor([[0.7, 9.0], [0.1, 0.2], [0.3, 0.3], [0.5, 0.5]])
    mask = torch.tensor([[True, False], [True, True], [True, True], [False, False]])
    assert select_tokens(entropy, mask).nonzero().tolist() == [[0, 0], [2, 0], [2, 1]]


@pytest.mark.parametrize(("q", "n"), [(0.2, 15), (0.07, 100), (0.14, 50), (0.28, 25), (0.29, 100)])
def test_a_cut_that_falls_on_a_token_keeps_it(q, n):
    """0.14 * 50 is 7.000000000000001: no token drops out by rounding."""
    entropy, mask = random_entropies(1, n + 1), all_tokens(1, n + 1)
    token = entropy.argsort(dim=1)[0, round(q * n)]
    assert select_tokens(entropy, mask, low=q, high=1.0)[0, token]
    assert select_tokens(entropy, mask, low=0.0, high=q)[0, token]


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("garbage", [torch.nan, torch.inf, -torch.inf, -5.0])
def test_padding_may_hold_anything(scope, garbage):
    entropy = random_entropies(3, 8)
    mask = torch.arange(8) < torch.tensor([[8], [5], [0]])
    chosen = select_tokens(entropy.masked_fill(~mask, garbage), mask, scope=scope)
    assert torch.equal(chosen, select_tokens(entropy, mask, scope=scope))
    assert chosen.any() and not chosen[~mask].any()


def test_choice_carries_no_gradient():
    """d objective / d H_t is 1 / |kept| at a kept token, else exactly 0: no path by the cuts."""
    entropy = random_entropies(2, 11).requires_grad_()
    chosen = select_tokens(entropy, all_tokens(2, 11))
    (gradient,) = torch.autograd.grad(selective_entropy(entropy, chosen).sum(), entropy)
    torch.testing.assert_close(gradient, chosen / chosen.sum(dim=1, keepdim=True))


def test_arguments_are_left_alone():
    logits, mask = random_logits(2, 6, 9), torch.arange(6) < torch.tensor([[6], [3]])
    entropy = random_entropies(2, 6)
    before = logits.clone(), entropy.clone(), mask.clone()
    token_entropy(logits)
    selective_entropy(entropy, select_tokens(entropy, mask))
    for x, x_before in zip((logits, entropy, mask), before, strict=True):
        assert torch.equal(x, x_before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mask": all_tokens(2, 4)}, r"must be \(N, T\), got \(2, 3\) and \(2, 4\)"),
        ({"mask": torch.ones(2, 3)}, "torch.float32"),
        ({"mask": torch.ones(2, 3, dtype=torch.long)}, "torch.int64"),
        ({"entropy": torch.ones(3), "mask": all_tokens(3)}, r"must be \(N, T\), got \(3,\)"),
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
    arguments = {"entropy": torch.ones(2, 3), "mask": all_tokens(2, 3)} | change
    with pytest.raises(ValueError, match=message):
        select_tokens(**arguments)


def test_trap_11_the_end_token_counts_when_it_equals_padding():
    """The mask comes from positions, so an end token with the padding's id stays."""
    eos = pad = 0
    tokens = torch.tensor([[5, 7, 6, eos, pad, pad]])
    length = (tokens != pad).sum(dim=1, keepdim=True) + 1  # the first eos is part of the response
    entropy = torch.tensor([[0.0, 5.0, 1.0, 2.0, 2.0, 2.0]])
    chosen = select_tokens(entropy, torch.arange(6) < length, low=0.2, high=0.8)
    assert chosen.tolist() == [[False, False, True, True, False, False]]


# ---------------------------------------------------------------------------- selective_entropy


def test_selective_entropy_is_the_mean_over_each_responses_kept_tokens():
    """A response without kept tokens gets 0, and no gradient."""
    entropy = torch.tensor([[1.0, 2.0, 6.0], [3.0, 5.0, 7.0], [9.0, 9.0, 9.0]])
    kept = torch.tensor([[True, False, True], [False, True, False], [False, False, False]])
    value, gradient = value_and_gradient(lambda x: selective_entropy(x, kept), entropy, 1.0)
    assert value.tolist() == [3.5, 5.0, 0.0]
    assert gradient.tolist() == [[0.5, 0.0, 0.5], [0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("garbage", [torch.nan, torch.inf])
def test_garbage_at_dropped_tokens_changes_neither_value_nor_gradient(garbage):
    entropy, kept = random_entropies(3, 5), torch.tensor([[True, True, False, False, True]] * 3)
    weights, dirty = torch.tensor([1.0, 2.0, 3.0]), entropy.masked_fill(~kept, garbage)
    found = value_and_gradient(lambda x: selective_entropy(x, kept), dirty, weights)
    expected = value_and_gradient(lambda x: selective_entropy(x, kept), entropy, weights)
    torch.testing.assert_close(found, expected)

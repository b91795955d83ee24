"""TsEC: token-selective entropy computation. It chooses the tokens whose entropy EgAS raises.

What it computes
    1. token_entropy      H_t = -sum_v p_t(v) log p_t(v), over the full vocabulary, in nats
    2. select_tokens      keep the tokens of moderate entropy: q_low(H) <= H_t <= q_high(H)
    3. selective_entropy  the mean entropy of a response's kept tokens

Where the rules come from
    paper        TsEC selects the tokens whose entropy enters the adversarial objective, so that the
                 attack is effective "without distorting factual knowledge".
    second-hand  The selected tokens have moderate, not extreme, entropy. The entropy is that of the
                 full vocabulary, averaged over each response.
    inferred     Both tails go. The low one is factual knowledge, the high one is uncertain already.
    ours         The cuts are the 20% and the 80% quantile of each response on its own. The choice
                 carries no gradient.

Symbols: N responses, T tokens (padded), V vocabulary. mask is True on a response's tokens, its end
token included.

    L, mask = 5, torch.ones(4, 9, dtype=torch.bool)               # L tokens of the prompt
    logits = torch.randn(4, L + 9, 50, requires_grad=True)        # a causal model's, of both
    entropy = token_entropy(logits[:, L-1:-1])                    # they predict the next token
    keep = select_tokens(entropy, mask, low=0.2, high=0.8)        # (N, T) bool
    objective = selective_entropy(entropy, keep).mean()           # a scalar to ascend
"""

import torch
from torch import Tensor


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """H = -sum_v p(v) log p(v), p = softmax(logits / temperature), in nats.   (..., V) -> (...)

    Float32, differentiable. A logit of -inf (a banned token) has p = 0 and adds nothing, neither to
    the value nor to the gradient.
    """
    logp = torch.log_softmax(logits.float() / temperature, dim=-1)
    # 0 * log 0 = 0: -inf is replaced before the product, or value and gradient would be NaN
    return -(logp.exp() * logp.masked_fill(logp == -torch.inf, 0.0)).sum(dim=-1)


def entropy_quantile(entropy: Tensor, mask: Tensor, q: float, scope: str = "response") -> Tensor:
    """The q-quantile of the entropies where mask is True.   (N, T), (N, T) bool -> (N,)

    Interpolated linearly, as in numpy. scope "response": each row on its own. "batch": all rows
    pooled, the one value repeated N times. A row without tokens gets NaN, which selects nothing.
    """
    if scope not in ("response", "batch"):
        raise ValueError(f"scope must be 'response' or 'batch', got {scope!r}")
    rows = entropy.shape[0]
    if scope == "batch":
        entropy, mask = entropy.reshape(1, -1), mask.reshape(1, -1)
    values = entropy.double().masked_fill(~mask, torch.inf).sort(dim=1).values  # tokens come first
    count = mask.sum(dim=1, keepdim=True)  # (N, 1)
    position = q * (count - 1).clamp(min=0).double()
    below = values.gather(1, position.floor().long())
    above = values.gather(1, position.ceil().long())
    quantile = below + (above - below) * (position - position.floor())
    quantile = torch.where(count > 0, quantile, torch.nan)
    # Back to the entropy's precision: the position 0.14 * 50 = 7.000000000000001 keeps its token.
    return quantile.to(entropy.dtype).squeeze(1).expand(rows)


@torch.no_grad()
def select_tokens(
    entropy: Tensor,
    mask: Tensor,
    low: float = 0.2,
    high: float = 0.8,
    scope: str = "response",
    which: str = "moderate",
) -> Tensor:
    """keep_t = mask_t and q_low <= H_t <= q_high.   (N, T), (N, T) bool -> (N, T) bool

    Moderate entropy: second-hand. Quantiles, their values and the scope: ours. low = 0 keeps the
    low tail, high = 1 the high one; both together are EgAS without TsEC. which "extreme": the
    tokens outside the cuts instead, a control. A response of one token keeps it. Both tokens of a
    response of two can fall outside the cuts, and then it keeps none.

    Raises ValueError for shapes that differ, a mask that is not bool, cuts outside
    0 <= low < high <= 1, NaN entropy, an unknown scope or which.
    """
    if entropy.ndim != 2 or entropy.shape != mask.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"entropy and a bool mask must be (N, T), got {tuple(entropy.shape)} and "
            f"{tuple(mask.shape)} {mask.dtype}"
        )
    if which not in ("moderate", "extreme"):
        raise ValueError(f"which must be 'moderate' or 'extreme', got {which!r}")
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"the cuts must satisfy 0 <= low < high <= 1, got low={low}, high={high}")
    if entropy[mask].isnan().any():
        raise ValueError("the entropy of a masked-in token is NaN")
    lower = entropy_quantile(entropy, mask, low, scope)[:, None]  # (N, 1)
    upper = entropy_quantile(entropy, mask, high, scope)[:, None]
    moderate = (entropy >= lower) & (entropy <= upper)
    return mask & (moderate if which == "moderate" else ~moderate)


def selective_entropy(entropy: Tensor, keep: Tensor) -> Tensor:
    """Mean entropy of each response's kept tokens; 0 if none is kept.   (N, T), (N, T) -> (N,)"""
    kept = entropy.masked_fill(~keep, 0.0)  # not entropy * keep: padding may hold NaN
    return kept.sum(dim=1) / keep.sum(dim=1).clamp(min=1)

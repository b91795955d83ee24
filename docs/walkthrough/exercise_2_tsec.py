"""Exercise 2 (step 2): TsEC's choice, the tokens of moderate entropy of each response.

Responses of different length are padded to one tensor; what stands at padding means nothing. The quantiles are those of
a response's own tokens, interpolated linearly (as numpy.quantile does), and a token that lies on a cut is kept.
"""

import numpy as np
import torch
from torch import Tensor


def select_tokens(entropy: Tensor, mask: Tensor, low: float = 0.2, high: float = 0.8) -> Tensor:
    """keep_t = mask_t and q_low <= H_t <= q_high, the response's quantiles.   (N, T), (N, T) bool -> (N, T) bool"""
    raise NotImplementedError


def check(select_tokens) -> None:
    lengths = torch.tensor([11, 6, 1, 9])
    mask = torch.arange(11) < lengths[:, None]
    entropy = torch.rand(4, 11, generator=torch.Generator().manual_seed(0)) * torch.tensor(
        [[0.1], [1.0], [2.0], [5.0]]
    )
    entropy[3] = entropy[3].round()  # many equal values
    for padding in (0.0, 99.0):
        values = entropy.masked_fill(~mask, padding)
        before = values.clone()
        keep = select_tokens(values, mask, 0.2, 0.8)
        assert torch.equal(values, before), "the argument was written to"
        assert keep.shape == mask.shape and keep.dtype == torch.bool, "a bool for every token"
        assert not (keep & ~mask).any(), "padding was chosen"
        for i, n in enumerate(lengths.tolist()):
            row = entropy[i, :n].numpy()
            cuts = np.quantile(row, [0.2, 0.8]).astype(np.float32)
            expected = [bool(cuts[0] - 1e-6 <= h <= cuts[1] + 1e-6) for h in row]
            assert keep[i, :n].tolist() == expected, (
                f"response {i} of {n} tokens, padded with {padding}"
            )
    everything = select_tokens(entropy, mask, 0.0, 1.0)
    assert torch.equal(everything, mask), "cuts 0 and 1 keep every token"

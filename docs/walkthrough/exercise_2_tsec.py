"""Exercise 2 (step 2): TsEC's choice, the tokens of moderate entropy of each response.

Responses of different lengths are padded to one tensor. Values at padding mean nothing. The
quantiles are those of a response's own tokens, interpolated linearly (as numpy.quantile does). A
token that lies on a cut is chosen.
"""

import numpy as np
import torch
from torch import Tensor


def select_tokens(entropy: Tensor, mask: Tensor, low: float = 0.2, high: float = 0.8) -> Tensor:
    """tsec_mask_t = mask_t and q_low <= H_t <= q_high, the quantiles of the response.

    (N, T), (N, T) bool -> (N, T) bool
    """
    raise NotImplementedError


def check(select_tokens) -> None:
    lengths = torch.tensor([11, 6, 1, 9])
    mask = torch.arange(11) < lengths[:, None]
    sizes = torch.tensor([[0.1], [1.0], [2.0], [5.0]])
    entropy = torch.rand(4, 11, generator=torch.Generator().manual_seed(0)) * sizes
    entropy[3] = entropy[3].round()  # many equal values
    for padding in (0.0, 99.0):
        values = entropy.masked_fill(~mask, padding)
        before = values.clone()
        chosen = select_tokens(values, mask, 0.2, 0.8)
        assert torch.equal(values, before), "the argument was written to"
        assert chosen.shape == mask.shape and chosen.dtype == torch.bool, "one bool per token"
        assert not (chosen & ~mask).any(), "padding was chosen"
        for i, n in enumerate(lengths.tolist()):
            row = entropy[i, :n].numpy()
            low, high = np.quantile(row, [0.2, 0.8]).astype(np.float32)
            expected = (low - 1e-6 <= row) & (row <= high + 1e-6)
            found = chosen[i, :n].tolist()
            assert found == expected.tolist(), f"response {i} of {n} tokens, padded with {padding}"
    everything = select_tokens(entropy, mask, 0.0, 1.0)
    assert torch.equal(everything, mask), "cuts 0 and 1 choose every token"

"""flash_attention_2 without its package: transformers' own path, with reference kernels on a CPU.

transformers unpads the rows, calls a kernel, and pads what it gives. Only the kernels are replaced.

    with fake_flash.installed() as calls:
        fake_flash.use(policy.model)
        policy.score(...)
    calls  # {"fixed": calls without padding, "varlen": calls with padding}
"""

import contextlib
from collections import Counter
from collections.abc import Iterator
from unittest import mock

import torch
import transformers.modeling_flash_attention_utils as flash
from torch import Tensor, nn


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window) -> Tensor:
    """Attention of one row.   (S, heads, d), (K, groups, d), (K, groups, d) -> (S, heads, d)"""
    repeats = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("qhd,khd->hqk", q.float(), k.float()) * scale
    if causal:  # the last query is at the last key, as in flash-attn since 2.1
        query = torch.arange(q.shape[0])[:, None] + k.shape[0] - q.shape[0]
        key = torch.arange(k.shape[0])[None]
        scores = scores.masked_fill(key > query, -torch.inf)
        if window[0] >= 0:
            scores = scores.masked_fill(key < query - window[0], -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)
    return torch.einsum("hqk,khd->qhd", weights, v.float()).to(q.dtype)


@contextlib.contextmanager
def installed() -> Iterator[Counter]:
    """Inside, transformers finds the kernels. -> how often each was called, and with which dtype

    The real ones raise for float32.
    """
    calls = Counter()

    def fixed(q, k, v, softmax_scale=None, causal=False, window_size=(-1, -1), dropout_p=0.0):
        calls.update(["fixed", q.dtype])
        options = (softmax_scale, causal, window_size)
        return torch.stack([attend(*row, *options) for row in zip(q, k, v, strict=True)])

    def varlen(
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        dropout_p=0.0,
    ):
        calls.update(["varlen", q.dtype])
        rows = [x.split(cu_seqlens_k.diff().tolist()) for x in (k, v)]
        rows = zip(q.split(cu_seqlens_q.diff().tolist()), *rows, strict=True)
        return torch.cat([attend(*row, softmax_scale, causal, window_size) for row in rows])

    def kernels(*args, **kwargs):
        return fixed, varlen, None, flash._pad_input, flash._unpad_input

    with mock.patch.object(flash, "_lazy_imports", kernels):
        flash._loaded_implementation = None
        yield calls
    flash._loaded_implementation = None


def use(model: nn.Module) -> None:
    """Set flash_attention_2 in every part of the model, as `attn_implementation` would."""
    for module in model.modules():
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None):
            config._attn_implementation = "flash_attention_2"

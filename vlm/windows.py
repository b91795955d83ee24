"""Attention over a vision tower's windows: one call per length of a window.

The Qwen-like towers attend within windows, frames or pictures. The library computes these one
after another with sdpa, and hands all of them over in one call to flash attention only. On a GPU
each call is a launch (docs/speed.md counts them). Here the tower's sdpa takes all windows in one
call, as flash attention does, and computes windows of equal length as a batch.
"""

import inspect

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

# The library passes all windows in one call to the implementations with "flash" in their name.
NAME = "sdpa_called_as_flash"
_layouts = WeakTensorKeyDictionary()  # all layers of a forward share their boundaries


def layout(boundaries: Tensor) -> tuple[list[tuple[int, int]], Tensor | None, Tensor | None]:
    """Which windows are of equal length, and the order of rows that puts these side by side.

    boundaries (W + 1,) -> [(windows, length)], order (S,), its inverse (S,). No order where the
    rows have it already. Waits for the device once per tensor of boundaries.
    """
    if boundaries in _layouts:
        return _layouts[boundaries]
    lengths = boundaries.diff().tolist()
    rows = torch.arange(sum(lengths))
    windows = {}
    for window in rows.split(lengths):
        windows.setdefault(len(window), []).append(window)
    groups = [(len(same), length) for length, same in windows.items()]
    order = torch.cat([window for same in windows.values() for window in same])
    inverse = order.argsort()
    if torch.equal(order, rows):
        order = inverse = None
    else:
        order, inverse = order.to(boundaries.device), inverse.to(boundaries.device)
    _layouts[boundaries] = groups, order, inverse
    return _layouts[boundaries]


def batched_windows(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """query (1, heads, S, d), key and value -> (1, S, heads, d). Without boundaries: one window."""
    options = dict(attention_mask=attention_mask, dropout=dropout, scaling=scaling, is_causal=False)
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(module, query, key, value, **options)
    groups, order, inverse = layout(cu_seq_lens_q)
    rows = [x.squeeze(0).transpose(0, 1) for x in (query, key, value)]  # (S, heads, d)
    if order is not None:
        rows = [x.index_select(0, order) for x in rows]
    parts = [x.split([windows * length for windows, length in groups]) for x in rows]
    outputs = []
    for group, *part in zip(groups, *parts, strict=True):
        batch = [x.unflatten(0, group).transpose(1, 2) for x in part]  # (windows, heads, length, d)
        outputs.append(sdpa_attention_forward(module, *batch, **options)[0].flatten(0, 1))
    output = torch.cat(outputs) if len(outputs) > 1 else outputs[0]
    if order is not None:
        output = output.index_select(0, inverse)
    return output[None], None


AttentionInterface.register(NAME, batched_windows)


def use_batched_windows(model: nn.Module) -> None:
    """Set it in the towers that attend within windows, where their attention is sdpa.

    A saved configuration does not hold it.
    """
    for module in model.modules():
        if "cu_seqlens" not in inspect.signature(module.forward).parameters:
            continue
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = NAME

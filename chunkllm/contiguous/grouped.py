"""Attention of a few queries to many keys: each key is read once for all heads that share it, by all threads."""

from __future__ import annotations

from math import gcd

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

_SHORTEST_PART = 2048  # places: fewer are read sooner than joined


def grouped_attention(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None, seen: int = 0
) -> Tensor:
    """Attention of a few queries to all keys, a key-value head at a time, so that no key is repeated or read twice.

    Args:
        query: [B, H, T, D].
        keys: [B, Hkv, S, D].
        values: [B, Hkv, S, D].
        mask: bool [B, 1, H / Hkv · T, S] or [B, 1, 1, S], what is read by the queries of a key-value head, or None.
        scaling: of attention logits.
        seen: places, from the first on, that the mask shows to all queries. Each must read one behind them, too.

    Returns:
        [B, T, H, D].
    """
    batch, heads, tokens, width = query.shape
    grouped = query.reshape(batch, keys.shape[1], -1, width)
    seen = keys.shape[2] if mask is None else seen
    parts = _parts(grouped, keys, values, seen)
    if parts > 1:
        out = _in_parts(grouped, keys, values, mask, scaling, seen // parts, parts)
    else:
        out = scaled_dot_product_attention(grouped, keys, values, attn_mask=mask, scale=scaling)
    return out.view(batch, heads, tokens, -1).transpose(1, 2).contiguous()  # some models view it


def _parts(query: Tensor, keys: Tensor, values: Tensor, seen: int) -> int:
    """Into how many parts places are divided: torch gives each head of a row to one thread of a CPU."""
    if keys.device.type != "cpu" or len(query) > 1 or not query.shape[3] == keys.shape[3] == values.shape[3]:
        return 1
    if torch.is_grad_enabled() and any(x.requires_grad for x in (query, keys, values)):
        return 1
    threads = torch.get_num_threads()
    return min(threads // gcd(keys.shape[1], threads), seen // _SHORTEST_PART)


def _in_parts(
    query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scaling: float | None, places: int, parts: int
) -> Tensor:
    """Attention [1, Hkv, R, D] to parts of so many places, all of which are seen, and to the rest.

    Parts are joined by the sums of their exponentials (Flash-Decoding; arXiv 2205.14135, section 3.1).
    """
    attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # gives the logarithms of those sums, too
    stop = places * parts
    each = [states[0, :, :stop].unflatten(1, (parts, places)).transpose(0, 1) for states in (keys, values)]
    out, sums = attend(query.expand(parts, -1, -1, -1), *each, scale=scaling)
    if stop < keys.shape[2]:
        hidden = None
        if mask is not None:
            hidden = torch.zeros(mask.shape[2], keys.shape[2] - stop, dtype=query.dtype)
            hidden = hidden.masked_fill_(~mask[0, 0, :, stop:], -torch.inf)[None, None]
        rest, its = attend(query, keys[:, :, stop:], values[:, :, stop:], attn_mask=hidden, scale=scaling)
        out, sums = torch.cat((out, rest)), torch.cat((sums, its))
    return (out * sums.softmax(0)[..., None]).sum(0, keepdim=True).to(query.dtype)

"""Attention in parts, beside the plain one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from chunkllm.contiguous import grouped
from chunkllm.contiguous.grouped import grouped_attention

WIDTH = 16


@pytest.fixture(params=[2, 3, 4])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Those of each call that was in parts, which may be of 32 places."""
    seen: list[int] = []
    own = grouped._in_parts

    def counted(*args: object) -> Tensor:
        seen.append(args[-1])  # type: ignore[arg-type]
        return own(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(grouped, "_in_parts", counted)
    monkeypatch.setattr(grouped, "_SHORTEST_PART", 32)
    return seen


def _states(heads: int, kv_heads: int, tokens: int, places: int, batch: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(places)
    query = torch.randn(batch, heads, tokens, WIDTH)
    keys, values = (torch.randn(batch, kv_heads, places + 9, WIDTH)[:, :, :places] for _ in range(2))  # with room
    return query, keys, values


def _plain(query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None) -> Tensor:
    """[B, T, H, D] from the definition, in float64."""
    repeats = query.shape[1] // keys.shape[1]
    keys, values = (states.double().repeat_interleave(repeats, 1) for states in (keys, values))
    return scaled_dot_product_attention(query.double(), keys, values, attn_mask=mask, scale=0.3).transpose(1, 2)


@pytest.mark.parametrize("places", [64, 127, 128, 301])
@pytest.mark.parametrize(("heads", "kv_heads"), [(9, 3), (4, 1), (6, 6)])
def test_one_query(places: int, heads: int, kv_heads: int, threads: int, parts: list[int]) -> None:
    states = _states(heads, kv_heads, 1, places)
    out = grouped_attention(*states, None, 0.3)
    torch.testing.assert_close(out.double(), _plain(*states, None), rtol=0, atol=1e-6)
    assert bool(parts) == (kv_heads % threads > 0)


@pytest.mark.parametrize("tokens", [2, 8])
@pytest.mark.parametrize("places", [64, 133])
def test_some_queries_at_the_end(tokens: int, places: int, threads: int, parts: list[int]) -> None:
    query, keys, values = _states(10, 5, tokens, places + tokens)
    mask = torch.ones(tokens, places + tokens, dtype=torch.bool).tril(places)
    out = grouped_attention(query, keys, values, mask.repeat(2, 1)[None, None], 0.3, seen=places)
    torch.testing.assert_close(out.double(), _plain(query, keys, values, mask), rtol=0, atol=1e-6)
    assert parts and max(parts) <= threads


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_lower_precision(dtype: torch.dtype, threads: int, parts: list[int]) -> None:
    states = [x.to(dtype) for x in _states(9, 1, 1, 200)]
    out = grouped_attention(*states, None, 0.3)
    assert out.dtype == dtype and parts
    torch.testing.assert_close(out.double(), _plain(*states, None), rtol=0, atol=8e-3)


def test_what_is_not_parted(threads: int, parts: list[int]) -> None:
    query, keys, values = _states(2, 1, 1, 500, batch=2)
    mask = torch.rand(2, 1, 1, 500) < 0.5
    torch.testing.assert_close(
        grouped_attention(query, keys, values, mask, 0.3).double(), _plain(query, keys, values, mask), rtol=0, atol=1e-6
    )
    single = [x[:1].requires_grad_() for x in (query, keys, values)]
    grouped_attention(*single, None, 0.3).sum().backward()
    grouped_attention(query[:1], keys[:1, :, :40], values[:1, :, :40], None, 0.3)
    grouped_attention(query[:1], keys[:1], values[:1, :, :, :8], None, 0.3)
    assert not parts

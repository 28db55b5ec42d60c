"""flash_attn_with_kvcache against keys and values concatenated by hand."""

import pytest
import torch
from helpers import random_qkv

from flash_attn import _ops, flash_attn_func, flash_attn_with_kvcache
from flash_attn.flash_attn_interface import flash_attn_gpu
from flash_attn.layers.rotary import apply_rotary_emb

LENGTHS = [5, 0, 23]  # keys in the cache before the call
CAPACITY = 40


def cache_and_step(device, dtype, new=3, rows=3):
    """A cache with garbage behind its end, and q, k, v of one step."""
    k_cache, v_cache = (torch.randn(rows, CAPACITY, 2, 64).to(device, dtype) for _ in range(2))
    q, k, v = random_qkv(device, dtype, 3, new, heads_kv=2)
    return k_cache, v_cache, q, k, v


def lengths_tensor(device, lengths=LENGTHS):
    return torch.tensor(lengths, dtype=torch.int32, device=device)


def by_hand(q, k_cache, v_cache, k, v, lengths=LENGTHS, rows=(0, 1, 2), skip=(0, 0, 0), **arguments):
    """Each sequence alone, with its keys concatenated."""
    outs = []
    for b, (length, row) in enumerate(zip(lengths, rows, strict=True)):
        keys = torch.cat([k_cache[row, skip[b] : length], k[b]])[None]
        values = torch.cat([v_cache[row, skip[b] : length], v[b]])[None]
        outs.append(flash_attn_func(q[b : b + 1], keys, values, **arguments))
    return torch.cat(outs)


@pytest.mark.parametrize("arguments", [{"causal": True}, {}, {"causal": True, "window_size": (4, 4), "softcap": 2.0}])
def test_append_and_attend(device, dtype, arguments):
    k_cache, v_cache, q, k, v = cache_and_step(device, dtype)
    expected = by_hand(q, k_cache, v_cache, k, v, **arguments)
    before = k_cache.clone(), v_cache.clone()
    used = lengths_tensor(device)
    out, lse = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=used, return_softmax_lse=True, **arguments
    )
    assert torch.equal(out, expected) and lse.shape == (3, 4, 3)
    for cache, old, new in zip((k_cache, v_cache), before, (k, v), strict=True):
        for b, n in enumerate(LENGTHS):
            assert torch.equal(cache[b, n : n + 3], new[b])
            assert torch.equal(cache[b, :n], old[b, :n]) and torch.equal(cache[b, n + 3 :], old[b, n + 3 :])


def test_one_length_for_all_and_the_whole_cache(device):
    k_cache, v_cache, q, _, _ = cache_and_step(device, torch.float32)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, cache_seqlens=11, causal=True)
    assert torch.equal(out, flash_attn_func(q, k_cache[:, :11], v_cache[:, :11], causal=True))
    assert torch.equal(flash_attn_with_kvcache(q, k_cache, v_cache), flash_attn_func(q, k_cache, v_cache))


def test_cache_rows(device):
    k_cache, v_cache, q, k, v = cache_and_step(device, torch.float32, rows=6)
    rows = [4, 0, 5]
    expected = by_hand(q, k_cache, v_cache, k, v, rows=rows, causal=True)
    index = lengths_tensor(device, rows)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=lengths_tensor(device), cache_batch_idx=index, causal=True
    )
    assert torch.equal(out, expected)
    assert torch.equal(k_cache[4, 5:8], k[0])


def test_left_padding(device):
    k_cache, v_cache, q, k, v = cache_and_step(device, torch.float32)
    skip = [2, 0, 20]
    expected = by_hand(q, k_cache, v_cache, k, v, skip=skip, causal=True)
    k_cache[0, :2], k_cache[2, :20] = torch.nan, torch.nan
    used, leftpad = lengths_tensor(device), lengths_tensor(device, skip)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=used, cache_leftpad=leftpad, causal=True)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("page_size", [1, 8, 16])
def test_pages(device, page_size):
    """Writes land in the right pages, the others stay, and the answer is that of a contiguous cache."""
    k_cache, v_cache, q, k, v = cache_and_step(device, torch.float32)
    pages = -(-CAPACITY // page_size)
    table = torch.randperm(3 * pages).view(3, pages)
    room = pages * page_size - CAPACITY
    paged = []
    for cache in (k_cache, v_cache):
        wide = torch.nn.functional.pad(cache, (0, 0, 0, 0, 0, room))
        pool = torch.empty(3 * pages, page_size, 2, 64, device=device)
        pool[table.flatten().to(device)] = wide.reshape(3 * pages, page_size, 2, 64)
        paged.append(pool)
    settings = {"cache_seqlens": lengths_tensor(device), "causal": True}
    expected = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **settings)
    table_on_device = table.int().to(device)
    out = flash_attn_with_kvcache(q, *paged, k, v, **settings, block_table=table_on_device)
    assert torch.equal(out, expected)
    for pool, cache in zip(paged, (k_cache, v_cache), strict=True):
        gathered = pool[table.to(device)].flatten(1, 2)[:, :CAPACITY]
        assert torch.equal(gathered, cache)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("page_size", [8, 16, 24, 64, 128, 320, 1000])
def test_pages_have_the_bits_of_a_contiguous_cache(device, page_size, dim):
    """One query and several, masks and modifiers; what is in use lies among NaN, and the table ends in anything."""
    lengths = [1000, 1, 333, 0]
    pages = -(-max(lengths) // page_size)
    table = torch.randperm(5 * pages)[: 4 * pages].view(4, pages)
    for dtype in (torch.bfloat16, torch.float32):
        pool = torch.full((2, 5 * pages, page_size, 2, dim), torch.nan).to(device, dtype)
        cache = torch.full((2, 4, pages * page_size, 2, dim), torch.nan).to(device, dtype)
        for b, length in enumerate(lengths):
            rows = torch.randn(2, length, 2, dim).to(device, dtype)
            cache[:, b, :length] = rows
            for page in range(-(-length // page_size)):
                part = rows[:, page * page_size : (page + 1) * page_size]
                pool[:, table[b, page], : part.shape[1]] = part
        used = torch.tensor(lengths, dtype=torch.int32, device=device)
        places = table.int().to(device)
        for b, length in enumerate(lengths):
            places[b, -(-length // page_size) :] = torch.tensor([10**6, -1, -(10**9)])[b % 3]
        for rows, arguments in (
            (1, {}),
            (1, {"window_size": (300, 0), "softcap": 5.0}),
            (130, {"causal": True}),
            (70, {"causal": True, "alibi_slopes": torch.rand(8, device=device)}),
        ):
            q = torch.randn(4, rows, 8, dim).to(device, dtype)
            expected, lse = flash_attn_with_kvcache(q, *cache, cache_seqlens=used, return_softmax_lse=True, **arguments)
            settings = {"cache_seqlens": used, "block_table": places, "return_softmax_lse": True, **arguments}
            found, found_lse = flash_attn_with_kvcache(q, *pool, **settings)
            assert torch.equal(found, expected) and torch.equal(found_lse, lse)


def test_pages_are_read_where_they_lie(device, monkeypatch):
    """No copy: what a decoding step allocates is small beside the cache."""
    monkeypatch.setattr(_ops, "gather_pages", lambda *_: pytest.fail("gathered"))
    cache = torch.randn(2, 64, 256, 4, 128, device=device, dtype=torch.bfloat16)
    q = torch.randn(8, 1, 16, 128, device=device, dtype=torch.bfloat16)
    used = torch.full((8,), 250, dtype=torch.int32, device=device)
    table = torch.randperm(8 * 4, device=device, dtype=torch.int32).view(8, 4)
    rows = torch.tensor([5, 1, 63, 0, 7, 40, 41, 2], dtype=torch.int32, device=device)
    pages = cache.view(2, 64 * 4, 64, 4, 128)
    for caches, where in ((pages, {"block_table": table}), (cache, {"cache_batch_idx": rows})):
        flash_attn_with_kvcache(q, *caches, cache_seqlens=used, **where)
        if device != "cuda":
            continue
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        flash_attn_with_kvcache(q, *caches, cache_seqlens=used, **where)
        assert torch.cuda.max_memory_allocated() - before < 2**20  # gathered, 4 MiB


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_rotary(device, interleaved, causal):
    k_cache, v_cache, q, k, v = cache_and_step(device, torch.float32)
    angle = torch.rand(CAPACITY, 8) * 6.0
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    used = lengths_tensor(device)
    k_turned = apply_rotary_emb(k, cos, sin, interleaved, seqlen_offsets=used)
    if causal:
        q_turned = apply_rotary_emb(q, cos, sin, interleaved, seqlen_offsets=used)
    else:  # every query stands at the first new position
        columns = [apply_rotary_emb(q[:, i : i + 1], cos, sin, interleaved, seqlen_offsets=used) for i in range(3)]
        q_turned = torch.cat(columns, 1)
    expected = by_hand(q_turned, k_cache, v_cache, k_turned, v, causal=causal)
    out = flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cos, sin, cache_seqlens=used, causal=causal, rotary_interleaved=interleaved
    )
    assert torch.equal(out, expected)
    assert torch.equal(k_cache[2, 23:26], k_turned[2])


@pytest.mark.parametrize("of_tables", [None, torch.float32, torch.float64])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "pairs"), [(64, 32), (64, 20), (40, 3), (33, 16), (3, 1), (64, 0)])
def test_rotary_of_every_size(device, dtype, dim, pairs, interleaved, of_tables):
    """Whole heads and parts of them, with and without 16-byte rows, tables of q's dtype and of others, into pages."""
    q, k, v = random_qkv(device, dtype, 3, 4, heads_kv=2, dim=dim)
    angle = torch.rand(CAPACITY, pairs) * 6.0
    cos, sin = (x.to(device, of_tables or dtype) for x in (angle.cos(), angle.sin()))
    pool = torch.zeros(2, 3 * CAPACITY // 8, 8, 2, dim).to(device, dtype)
    table = torch.randperm(pool.shape[1]).view(3, -1).to(device)
    used = lengths_tensor(device)
    settings = {"cache_seqlens": used, "causal": True, "rotary_interleaved": interleaved}
    out = flash_attn_with_kvcache(q, *pool, k, v, cos, sin, block_table=table.int(), **settings)
    q_turned, k_turned = (apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=used) for x in (q, k))
    for cache, new in zip(pool, (k_turned, v), strict=True):
        rows = cache[table].flatten(1, 2)
        for b, n in enumerate(LENGTHS):
            assert torch.equal(rows[b, n : n + 4], new[b]) and not rows[b, :n].any() and not rows[b, n + 4 :].any()
    caches = (torch.zeros(3, CAPACITY, 2, dim).to(device, dtype) for _ in "kv")
    assert torch.equal(out, flash_attn_with_kvcache(q_turned, *caches, k_turned, v, cache_seqlens=used, causal=True))


def test_queries_may_be_more_than_the_new_keys(device):
    """Those past the tables stand at their last position."""
    k_cache, v_cache, q, k, v = cache_and_step(device, torch.float32)
    angle = torch.rand(CAPACITY, 32)
    cos, sin = angle.cos().to(device), angle.sin().to(device)
    lengths = [CAPACITY - 1] * 3
    step = {"cache_seqlens": lengths_tensor(device, lengths), "causal": True, "rotary_interleaved": False}
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k[:, :1], v[:, :1], cos, sin, **step)
    at = torch.tensor([CAPACITY - 1] * 3, device=device)
    q_turned = apply_rotary_emb(q, cos[at], sin[at])
    assert torch.equal(out, flash_attn_with_kvcache(q_turned, k_cache, v_cache, causal=True))


def test_alibi_counts_from_the_end(device):
    k_cache, v_cache, q, k, v = cache_and_step(device, torch.float32)
    slopes = torch.rand(4, device=device)
    expected = by_hand(q, k_cache, v_cache, k, v, alibi_slopes=slopes, causal=True)
    used = lengths_tensor(device)
    out = flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=used, alibi_slopes=slopes, causal=True)
    assert torch.equal(out, expected)


def test_strided_cache(device):
    """k and v in one tensor, as modules keep them: written and read through views."""
    both = torch.randn(3, CAPACITY, 2, 2, 64, device=device)
    q, k, v = random_qkv(device, torch.float32, 3, 2, heads_kv=2)
    expected = by_hand(q, both[:, :, 0].clone(), both[:, :, 1].clone(), k, v, causal=True)
    settings = {"cache_seqlens": lengths_tensor(device), "causal": True}
    assert torch.equal(flash_attn_with_kvcache(q, both[:, :, 0], both[:, :, 1], k, v, **settings), expected)
    assert torch.equal(both[0, 5:7, 1], v[0])


def test_cache_of_any_strides(device):
    """Heads' elements far apart: written and read through a copy."""
    k_cache, v_cache, q, k, v = cache_and_step(device, torch.float32)
    caches = [x.movedim(-1, 0).contiguous().movedim(0, -1) for x in (k_cache, v_cache)]
    settings = {"cache_seqlens": lengths_tensor(device), "causal": True}
    out = flash_attn_with_kvcache(q, *caches, k, v, **settings)
    assert torch.equal(out, flash_attn_with_kvcache(q, k_cache, v_cache, k, v, **settings))
    assert torch.equal(caches[0], k_cache) and torch.equal(caches[1], v_cache)


def test_compiled_module_signature(device):
    k_cache, v_cache, q, k, v = cache_and_step(device, torch.float32)
    expected = by_hand(q, k_cache, v_cache, k, v, causal=True, softmax_scale=0.3)
    used = lengths_tensor(device)
    place = torch.empty_like(q)
    out, lse = flash_attn_gpu.fwd_kvcache(
        q, k_cache, v_cache, k, v, used, None, None, None, None, None, None, place, 0.3, True, -1, -1, 0.0, True, 0
    )
    assert out is place and torch.equal(out, expected) and lse.shape == (3, 4, 3)

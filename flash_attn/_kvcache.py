"""Decoding with a key-value cache: append, rotate, attend."""

from typing import Any

import torch
from torch import Tensor

from flash_attn import _checks as check
from flash_attn import _library
from flash_attn import _prepare as prepare
from flash_attn._ops import append, forward, gather_pages


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
) -> Any:
    """Writes k and v into the cache in place behind what it holds, then attends to the cache.

    Args:
        q: [batch, seqlen_q, heads_q, dim].
        k_cache, v_cache: [batch_cache, seqlen_cache, heads_kv, dim], or with block_table pages
            [num_blocks, page_size, heads_kv, dim] of any page size.
        k, v: [batch, seqlen_new, heads_kv, dim], or None to append nothing. They need cache_seqlens.
        rotary_cos, rotary_sin: [seqlen_rotary, rotary_dim / 2]. k's row i is rotated to position cache_seqlens + i
            before it is stored; q's row i to the same where causal or a window is on, else to cache_seqlens.
        cache_seqlens: keys in the cache before the call, one int or int32 [batch]; None: the cache is full.
        cache_batch_idx: int32 [batch], the cache row of each sequence.
        cache_leftpad: int32 [batch], keys at the start of each cache row to skip (gathers a copy).
        block_table: int32 [batch, pages], the pages of each sequence. They are read where they lie, as the rows of
            cache_batch_idx are, if a page has a multiple of 8 keys (Hopper), of the key block (AMD) or any number
            (elsewhere); else they are gathered into a copy.
        softmax_scale, causal, window_size, softcap, alibi_slopes: as in `flash_attn_func`; seqlen_k is the number of
            keys after appending, less the left padding.
        num_splits: kept for callers' sake; the planner decides, and results never depend on it.
        return_softmax_lse: also return the LSE.

    Returns:
        out [batch, seqlen_q, heads_q, dim], or (out, softmax_lse [batch, heads_q, seqlen_q]). No gradient is recorded.

    The values of cache_seqlens, cache_batch_idx, cache_leftpad and block_table are checked where they lie on the CPU.
    """
    _library.require()
    _check(q, k_cache, v_cache, k, v, cache_batch_idx, block_table)
    if check.integer("num_splits", num_splits, "an int, 0 or positive", "pass 0") < 0:
        check.fail("num_splits", "must be an int, 0 or positive", num_splits, "pass 0")
    with torch.no_grad():
        capacity = k_cache.shape[1] * (1 if block_table is None else block_table.shape[1])
        new = 0 if k is None else k.shape[1]
        before = _lengths(cache_seqlens, q, capacity - new)
        if block_table is not None:
            used = before
            if before is not None and check.values_are_readable(before):
                used = before + new
            block_table = prepare.check_block_table(block_table, k_cache, q.shape[0], used, 0)
        elif cache_batch_idx is not None:
            block_table = _cache_rows(cache_batch_idx, q.shape[0], k_cache)[:, None]  # of pages that are whole rows
        rotary = None
        if rotary_cos is not None or rotary_sin is not None:
            if k is None or before is None:
                fix = "pass the rows to append, or rotate beforehand"
                check.fail("rotary_cos", "needs k, v and cache_seqlens", None, fix)
            rotary = _check_rotary(rotary_cos, rotary_sin, q, capacity)
        after = before
        if k is not None:
            if before is None:
                check.fail("cache_seqlens", "must be given with k and v", None, "pass the number of keys in the cache")
            local = check.window(window_size, causal) != (-1, -1)
            q, after = append(q, k, v, k_cache, v_cache, before, block_table, rotary, bool(rotary_interleaved), local)
        if cache_leftpad is not None:
            k_cache, v_cache, after = _skip_padding(q.shape[0], k_cache, v_cache, cache_leftpad, block_table, after)
            block_table = None
        options = prepare.options(
            q,
            q.shape[1],
            capacity,
            softmax_scale=softmax_scale,
            causal=causal,
            window_size=window_size,
            softcap=softcap,
        )
        tensors = prepare.tensors(q, q.shape[0], 0.0, seqused_k=after, alibi_slopes=alibi_slopes)
        out, softmax_lse, _ = forward(q, k_cache, v_cache, tensors, options, block_table)
    return (out, softmax_lse) if return_softmax_lse else out


def _check(q, k_cache, v_cache, k, v, cache_batch_idx, block_table) -> None:
    """Shapes, dtypes and devices of the tensors that hold rows."""
    check.paged(q, k_cache, v_cache, ("q", "k_cache", "v_cache"))
    batch = q.shape[0]
    if block_table is not None:
        check.tensor("block_table", block_table, ("batch", "pages"))
    if block_table is not None and cache_batch_idx is not None:
        check.fail("cache_batch_idx", "must be None with block_table", "both", "order the rows of block_table instead")
    if block_table is None and cache_batch_idx is None and k_cache.shape[0] != batch:
        fix = "pass cache_batch_idx to choose rows"
        check.fail("k_cache", f"batch must be that of q, {batch}", k_cache.shape[0], fix)
    if (k is None) != (v is None):
        check.fail("v" if v is None else "k", "must come with the other of k, v", None, "pass both or neither")
    if k is not None:
        check.qkv(q, k, v)
        if k.shape[2] != k_cache.shape[2]:
            check.fail("k", f"heads must be those of the cache, {k_cache.shape[2]}", k.shape[2], "check the layout")


def _lengths(cache_seqlens: int | Tensor | None, q: Tensor, most: int) -> Tensor | None:
    """cache_seqlens as int32 [batch], each in [0, most]; most leaves room for the rows to append."""
    batch = q.shape[0]
    if most < 0:
        check.fail("k", "must fit into the cache", f"{-most} rows too many", "allocate a longer cache")
    if cache_seqlens is None:
        return None
    fix = "allocate a longer cache or pass fewer new rows"
    if isinstance(cache_seqlens, Tensor):
        lengths = check.int32_vector("cache_seqlens", cache_seqlens, q.device, batch)
        check.in_range("cache_seqlens", lengths, 0, most, fix)
        return lengths
    wanted = "an int, an int32 tensor or None"
    length = check.integer("cache_seqlens", cache_seqlens, wanted, "pass the keys in the cache")
    if not 0 <= length <= most:
        check.fail("cache_seqlens", f"must lie in [0, {most}]", length, fix)
    return torch.full((batch,), length, dtype=torch.int32, device=q.device)


def _cache_rows(cache_batch_idx: Tensor, batch: int, k_cache: Tensor) -> Tensor:
    """The row of the cache that each sequence lives in, int32 [batch]."""
    index = check.int32_vector("cache_batch_idx", cache_batch_idx, k_cache.device, batch)
    check.in_range("cache_batch_idx", index, 0, k_cache.shape[0] - 1, "point at existing rows")
    return index


def _check_rotary(cos: Any, sin: Any, q: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, which are [at least positions, rotary_dim / 2] with rotary_dim at most head_dim."""
    check.rotary_tables(cos, sin, q, ("rotary_cos", "rotary_sin"))
    if cos.shape[0] < positions:
        check.fail("rotary_cos", f"must have the cache's {positions} rows", cos.shape[0], "compute a longer table")
    return cos, sin


def _skip_padding(
    batch: int,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_leftpad: Tensor,
    block_table: Tensor | None,
    after: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of keys and values behind the padding, [batch, seqlen_k, heads_kv, dim], and how many are in use."""
    if block_table is not None:
        capacity = block_table.shape[1] * k_cache.shape[1]
        k_cache, v_cache = (gather_pages(cache, block_table, capacity) for cache in (k_cache, v_cache))
    leftpad = check.int32_vector("cache_leftpad", cache_leftpad, k_cache.device, batch)
    seqlen = k_cache.shape[1]
    check.in_range("cache_leftpad", leftpad, 0, seqlen, "skip at most the whole cache")
    row = torch.arange(batch, device=leftpad.device)[:, None]
    position = (leftpad.long()[:, None] + torch.arange(seqlen, device=leftpad.device)).clamp(max=seqlen - 1)
    used = (torch.full_like(leftpad, seqlen) if after is None else after) - leftpad
    return k_cache[row, position], v_cache[row, position], used.clamp(min=0)

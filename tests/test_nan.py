"""NaN and infinity go where the definition sends them, and nowhere else."""

import pytest
import torch
from helpers import cumulative, gradients, random_qkv

from flash_attn import flash_attn_func, flash_attn_varlen_func, flash_attn_with_kvcache

BAD = [torch.nan, torch.inf, -torch.inf]


@pytest.mark.parametrize("bad", BAD)
def test_in_q_spoils_its_row_only(device, dtype, bad):
    q, k, v = random_qkv(device, dtype, 2, 70, 90)
    clean = flash_attn_func(q, k, v, causal=True)
    q[1, 33, 2, 5] = bad
    out = flash_attn_func(q, k, v, causal=True)
    assert not out[1, 33, 2].isfinite().all()
    out[1, 33, 2] = clean[1, 33, 2]
    assert torch.equal(out, clean)


def test_nan_in_k_spoils_the_rows_that_see_it(device, dtype):
    q, k, v = random_qkv(device, dtype, 2, 90, 90, heads_kv=2)
    clean = flash_attn_func(q, k, v, causal=True)
    k[1, 40, 1, 3] = torch.nan
    out = flash_attn_func(q, k, v, causal=True)
    assert out[1, 40:, 2:].isnan().all()
    assert torch.equal(out[1, :40], clean[1, :40])
    assert torch.equal(out[0], clean[0]) and torch.equal(out[1, :, :2], clean[1, :, :2])


def test_nan_in_v_stays_in_its_head_and_sequence(device, dtype):
    """Rows of the same head that do not see the key may become NaN (0 * NaN) or not; others may not."""
    q, k, v = random_qkv(device, dtype, 2, 90, 90, heads_kv=2)
    clean = flash_attn_func(q, k, v, causal=True)
    v[1, 40, 1, 3] = torch.nan
    out = flash_attn_func(q, k, v, causal=True)
    assert out[1, 40:, 2:, 3].isnan().all()
    out[1, :, 2:, 3] = clean[1, :, 2:, 3]
    assert torch.equal(out, clean)


def test_neighbours_in_a_pack_are_safe(device, dtype):
    lengths = [20, 33, 11]
    at = cumulative(lengths, device)
    q, k, v = (torch.randn(64, 2, 64).to(device, dtype) for _ in range(3))
    settings = {"cu_seqlens_q": at, "cu_seqlens_k": at, "max_seqlen_q": 33, "max_seqlen_k": 33}
    clean = flash_attn_varlen_func(q, k, v, **settings)
    for x in (q, k, v):
        x[20:53] = torch.nan
    out = flash_attn_varlen_func(q, k, v, **settings)
    assert out[20:53].isnan().all()
    assert torch.equal(out[:20], clean[:20]) and torch.equal(out[53:], clean[53:])


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
def test_gradients_of_neighbours_in_a_pack_are_safe(device, dtype, dim):
    """Keys that a whole block of queries sees, and queries behind which another sequence begins within a block."""
    at = cumulative([130, 70, 140], device)
    where = {"cu_seqlens_q": at, "cu_seqlens_k": at, "max_seqlen_q": 140, "max_seqlen_k": 140, "deterministic": True}
    inputs = [torch.randn(340, 2, dim).to(device, dtype) for _ in range(4)]

    def run():
        leaves = tuple(x.clone().requires_grad_() for x in inputs[:3])
        return gradients(flash_attn_varlen_func(*leaves, **where), leaves, inputs[3])

    clean = run()
    for x in inputs:
        x[130:200] = torch.nan
    for got, wanted in zip(run(), clean, strict=True):
        assert got[130:200].isnan().all()
        assert torch.equal(got[:130], wanted[:130]) and torch.equal(got[200:], wanted[200:])


def test_what_lies_behind_the_end_is_never_used(device, dtype):
    q, k, v = random_qkv(device, dtype, 2, 3, 100)
    used = torch.tensor([17, 64], dtype=torch.int32, device=device)
    clean = flash_attn_with_kvcache(q, k, v, cache_seqlens=used, causal=True)
    for b, n in enumerate((17, 64)):
        k[b, n:], v[b, n:] = torch.nan, torch.inf
    assert torch.equal(flash_attn_with_kvcache(q, k, v, cache_seqlens=used, causal=True), clean)


def test_gradients_stay_in_their_head_and_batch(device, dtype):
    q, k, v = random_qkv(device, dtype, 2, 70, 70, grad=True)
    dout = torch.randn(q.shape).to(q)
    clean = gradients(flash_attn_func(q, k, v, causal=True, deterministic=True), (q, k, v), dout)
    dout[1, 33, 2] = torch.nan
    found = gradients(flash_attn_func(q, k, v, causal=True, deterministic=True), (q, k, v), dout)
    for got, wanted in zip(found, clean, strict=True):
        assert got[1, :, 2].isnan().any()
        assert torch.equal(got[0], wanted[0])
        assert torch.equal(got[1, :, [0, 1, 3]], wanted[1, :, [0, 1, 3]])
    dq, clean_dq = found[0], clean[0]
    assert torch.equal(dq[1, :33], clean_dq[1, :33]) and torch.equal(dq[1, 34:], clean_dq[1, 34:])


def test_infinite_score_is_infinite_weight_as_in_the_definition(device):
    """exp(inf - inf): one infinite score makes its row NaN, as torch's softmax does."""
    q, k, v = random_qkv(device, torch.float32)
    k[0, 7, 0, 0] = torch.inf
    out = flash_attn_func(q, k, v)
    assert not out[0, :, 0].isfinite().all()
    assert out[1].isfinite().all() and out[0, :, 1:].isfinite().all()

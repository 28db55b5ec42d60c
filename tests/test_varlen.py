"""Packed sequences: against the reference, against the padded functions, with pages, with rows to spare."""

import math

import pytest
import torch
from helpers import (
    FEATURES,
    assert_forward_accurate,
    assert_gradients_accurate,
    cumulative,
    exact,
    feature,
    gradients,
    longest,
    random_packed,
    random_qkv,
)
from hypothesis import given, settings
from hypothesis import strategies as st

import flash_attn
from flash_attn import (
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward
from flash_attn.reference import attention_reference

LENGTHS_Q, LENGTHS_K = [5, 70, 1, 0, 33], [64, 70, 9, 12, 0]


def check(lengths_q, lengths_k, device, dtype, name="causal", **shape):
    """Compares out, LSE and gradients with the definition."""
    q, k, v, where = random_packed(device, dtype, lengths_q, lengths_k, grad=True, **shape)
    arguments = feature(name, q, batch=len(lengths_q))
    out, lse, _ = flash_attn_varlen_func(
        q, k, v, **where, **longest(lengths_q, lengths_k), **arguments, return_attn_probs=True
    )
    inputs = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    expected, plain = exact(*inputs, **where, **arguments), attention_reference(q, k, v, **where, **arguments)
    assert_forward_accurate((out, lse), plain, expected)
    if q.numel() == 0 or k.numel() == 0:
        return
    dout = torch.randn(out.shape).to(out)
    found = gradients(out, (q, k, v), dout)
    rough = gradients(plain.out, (q, k, v), dout)
    wanted = gradients(expected.out, inputs, dout.double())
    assert_gradients_accurate(found, rough, wanted, (q, k, v), dout, arguments.get("softmax_scale"))


@pytest.mark.parametrize("name", FEATURES)
def test_features(device, dtype, name):
    check(LENGTHS_Q, LENGTHS_K, device, dtype, name)


@pytest.mark.parametrize("dim", [1, 24, 64, 129])
def test_head_dims(device, dim):
    check([3, 40, 17], [60, 2, 17], device, torch.float32, dim=dim)


@pytest.mark.parametrize("lengths", [([0], [0]), ([0, 0], [3, 0]), ([4], [0]), ([1], [1]), ([], [])])
def test_degenerate_batches(device, lengths):
    check(*lengths, device, torch.float32)


def test_agrees_with_padded(device, dtype):
    q, k, v = random_qkv(device, dtype, 3, 40, 50)
    where = {"cu_seqlens_q": cumulative([40] * 3, device), "cu_seqlens_k": cumulative([50] * 3, device)}
    packed = flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), **where, max_seqlen_q=40, max_seqlen_k=50, causal=True
    )
    assert torch.equal(packed.unflatten(0, (3, 40)), flash_attn_func(q, k, v, causal=True))


def test_packed_variants_are_the_same_function(device, dtype):
    lengths = [5, 0, 33]
    at = cumulative(lengths, device)
    qkv = torch.randn(38, 3, 4, 64).to(device, dtype).requires_grad_()
    parts = tuple(part.detach().requires_grad_() for part in qkv.unbind(1))
    settings_ = {"causal": True, "deterministic": True}
    expected = flash_attn_varlen_func(*parts, at, at, 33, 33, **settings_)
    out = flash_attn_varlen_qkvpacked_func(qkv, at, 33, **settings_)
    assert torch.equal(out, expected)
    dout = torch.randn(out.shape).to(out)
    (dqkv,) = gradients(out, (qkv,), dout)
    assert torch.equal(dqkv, torch.stack(gradients(expected, parts, dout), 1))
    kv = qkv.detach()[:, 1:].requires_grad_()
    out = flash_attn_varlen_kvpacked_func(parts[0], kv, at, at, 33, 33, **settings_)
    assert torch.equal(out, expected)
    assert torch.equal(gradients(out, (kv,), dout)[0], dqkv[:, 1:])


def test_longest_length_as_a_tensor_and_too_long(device):
    q, k, v, where = random_packed(device, torch.float32, [7, 3], [7, 3])
    expected = flash_attn_varlen_func(q, k, v, **where, max_seqlen_q=7, max_seqlen_k=7)
    seven = torch.tensor(7, device=device)
    assert torch.equal(flash_attn_varlen_func(q, k, v, **where, max_seqlen_q=seven, max_seqlen_k=seven), expected)
    assert torch.equal(flash_attn_varlen_func(q, k, v, **where, max_seqlen_q=500, max_seqlen_k=500), expected)


def test_rows_of_no_sequence_give_nothing(device):
    q, k, v, where = random_packed(device, torch.float32, [7, 3], [7, 3])
    spare = [torch.cat([x, torch.full_like(x[:4], torch.nan)]).requires_grad_() for x in (q, k, v)]
    lengths = {"max_seqlen_q": 7, "max_seqlen_k": 7}
    out, lse, _ = flash_attn_varlen_func(*spare, **where, **lengths, causal=True, return_attn_probs=True)
    assert torch.equal(out[:10], flash_attn_varlen_func(q, k, v, **where, **lengths, causal=True))
    assert torch.equal(out[10:], torch.zeros_like(out[10:]))
    assert (lse[:, 10:] == math.inf).all()
    found = gradients(out, tuple(spare), torch.randn(out.shape).to(out))
    assert all(torch.equal(x[10:], torch.zeros_like(x[10:])) and x.isfinite().all() for x in found)


@pytest.mark.parametrize("causal", [False, True])
def test_many_sequences(device, dtype, causal):
    """More than a warp has lanes, most of them far shorter than the longest, none among them, and rows to spare."""
    torch.manual_seed(0)
    lengths = [*torch.randint(0, 40, (66,)).tolist(), 900, 0, 7]
    q, k, v, where = random_packed(device, dtype, lengths, lengths, grad=True, heads_q=4, heads_kv=2)
    q, k, v = (torch.cat([x.detach(), torch.full_like(x[:9], math.nan)]).requires_grad_() for x in (q, k, v))
    dout = torch.randn_like(q)
    out = flash_attn_varlen_func(q, k, v, **where, **longest(lengths, lengths), causal=causal, deterministic=True)
    found = (out, *gradients(out, (q, k, v), dout))
    begin = 0
    for length in lengths:
        rows = slice(begin, begin + length)
        alone = [x.detach()[None, rows].requires_grad_() for x in (q, k, v)]
        out = flash_attn_func(*alone, causal=causal, deterministic=True)
        for of_all, own in zip(found, (out, *gradients(out, alone, dout[None, rows])), strict=True):
            assert torch.equal(of_all[rows], own[0])
        begin += length
    assert all(not x[begin:].any() for x in found)


@pytest.mark.parametrize("page_size", [1, 16, 48])
def test_pages(device, dtype, page_size):
    lengths_q, lengths_k = [4, 1, 9], [100, 1, 47]
    q, k, v, where = random_packed(device, dtype, lengths_q, lengths_k)
    pages = -(-max(lengths_k) // page_size)
    table = torch.full((3, pages), 10**6, dtype=torch.int32)  # entries behind the end may hold anything
    caches = [torch.full((3 * pages, page_size, 2, 64), torch.nan).to(device, dtype) for _ in range(2)]
    free = torch.randperm(3 * pages).tolist()
    begin = 0
    for b, length in enumerate(lengths_k):
        for page in range(-(-length // page_size)):
            table[b, page] = free.pop()
            rows = slice(begin + page * page_size, min(begin + (page + 1) * page_size, begin + length))
            for cache, x in zip(caches, (k, v), strict=True):
                cache[int(table[b, page]), : rows.stop - rows.start] = x[rows]
        begin += length
    arguments = {**where, **longest(lengths_q, lengths_k), "causal": True}
    expected = flash_attn_varlen_func(q, k, v, **arguments)
    table = table.to(device)
    assert torch.equal(flash_attn_varlen_func(q, *caches, **arguments, block_table=table), expected)
    used = torch.tensor(lengths_k, dtype=torch.int32, device=device)  # says it alone
    scale, nothing = q.shape[-1] ** -0.5, torch.zeros_like(where["cu_seqlens_k"])
    ends = where["cu_seqlens_q"], nothing
    told = {"causal": True, "block_table": table, "seqused_k": used}
    out = _flash_attn_varlen_forward(q, *caches, *ends, max(lengths_q), max(lengths_k), 0.0, scale, **told)[0]
    assert torch.equal(out, expected)
    q.requires_grad_()
    outs = (
        flash_attn_varlen_func(q, *keys, **arguments, block_table=where_they_are, deterministic=True)
        for keys, where_they_are in (((k, v), None), (caches, table))
    )
    assert torch.equal(*(gradients(out, (q,), torch.ones_like(out))[0] for out in outs))


def test_version_0_2_names(device):
    lengths = [5, 8, 2]
    at = cumulative(lengths, device)
    qkv = torch.randn(15, 3, 4, 64, device=device)
    q, k, v = qkv.unbind(1)
    expected = flash_attn_varlen_func(q, k, v, at, at, 8, 8, causal=True)
    assert torch.equal(flash_attn.flash_attn_unpadded_func(q, k, v, at, at, 8, 8, 0.0, causal=True), expected)
    actual = flash_attn.flash_attn_unpadded_kvpacked_func(q, qkv[:, 1:], at, at, 8, 8, 0.0, causal=True)
    assert torch.equal(actual, expected)
    assert torch.equal(flash_attn.flash_attn_unpadded_qkvpacked_func(qkv, at, 8, 0.0, causal=True), expected)
    split = flash_attn.flash_attn_unpadded_qkvpacked_split_func(qkv, at, 8, 2, 2, 0.0, causal=True)
    assert torch.equal(split, expected)
    out, lse, first, second = flash_attn.flash_attn_unpadded_qkvpacked_split_func(
        qkv, at, 8, 2, 2, 0.2, return_attn_probs=True
    )
    assert lse.shape == (4, 15)
    assert first.shape == (2, 4, 8, 8) and second.shape == (1, 4, 2, 2)
    weights = torch.relu(second[0]) / 0.8
    assert torch.allclose(out[13:], torch.einsum("hij,jhd->ihd", weights, v[13:]), atol=1e-5)  # float32 sums of 2


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 90)), min_size=1, max_size=5),
    name=st.sampled_from(list(FEATURES)),
    seed=st.integers(0, 1000),
)
def test_any_lengths(lengths, name, seed):
    torch.manual_seed(seed)
    lengths_q, lengths_k = (list(column) for column in zip(*lengths, strict=True))
    check(lengths_q, lengths_k, "cpu", torch.float32, name)

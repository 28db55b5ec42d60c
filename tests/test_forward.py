"""The padded forward against the float64 reference."""

import math

import pytest
import torch
from helpers import DEVICES, FEATURES, assert_forward_accurate, error, exact, feature, random_qkv, rising_scores
from hypothesis import given, settings
from hypothesis import strategies as st

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from flash_attn.reference import attention_reference


def check(q, k, v, **arguments):
    """Compares out and LSE with the definition."""
    out, lse, _ = flash_attn_func(q, k, v, return_attn_probs=True, **arguments)
    expected, plain = exact(q, k, v, **arguments), attention_reference(q, k, v, **arguments)
    assert out.dtype == q.dtype and out.is_contiguous()
    assert lse.dtype == (torch.float64 if q.dtype == torch.float64 else torch.float32)
    assert_forward_accurate((out, lse), plain, expected)
    return out


@pytest.mark.parametrize("name", FEATURES)
def test_features(device, dtype, name):
    q, k, v = random_qkv(device, dtype, seqlen_q=45, seqlen_k=83, heads_kv=2)
    check(q, k, v, **feature(name, q))


@pytest.mark.parametrize("name", ["full", "causal", "window", "everything"])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 200), (3, 130), (64, 64), (65, 63), (128, 129), (200, 7), (257, 400)])
@pytest.mark.parametrize("element, dim", [("float32", 32), ("bfloat16", 64), ("float16", 128), ("bfloat16", 256)])
def test_lengths(device, lengths, name, element, dim):
    q, k, v = random_qkv(device, getattr(torch, element), 2, *lengths, heads_q=2, dim=dim)
    check(q, k, v, **feature(name, q))


@pytest.mark.parametrize("dim", [1, 2, 3, 8, 20, 33, 40, 64, 72, 96, 128, 160, 192, 255, 256])
def test_head_dims(device, dim):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = random_qkv(device, dtype, 1, 33, 70, heads_q=2, dim=dim)
        check(q, k, v, causal=True)


@pytest.mark.parametrize("heads", [(1, 1), (3, 3), (6, 2), (5, 1), (16, 4)])
def test_grouped_heads(device, heads):
    q, k, v = random_qkv(device, torch.float32, 1, 20, 30, *heads)
    check(q, k, v, causal=True)


@pytest.mark.parametrize("name", FEATURES)
def test_one_query_of_grouped_heads(device, dtype, name):
    """A GPU may treat heads that share keys as rows. In place: q's heads are every other of a wider tensor's."""
    wide, k, v = random_qkv(device, dtype, 3, 1, 1100, heads_q=16, heads_kv=2, dim=64)
    q = wide[:, :, ::2]
    check(q, k, v, **feature(name, q))


@pytest.mark.parametrize("dim", [40, 64, 128, 192, 256])
@pytest.mark.parametrize("keys, heads", [(300, (8, 2)), (5000, (32, 8)), (20000, (6, 3))])
def test_one_query_of_many_keys(device, keys, heads, dim):
    """A GPU may share them out among thread blocks, of which some have no columns of the output to fold."""
    q, k, v = random_qkv(device, torch.bfloat16, 1, 1, keys, *heads, dim=dim)
    check(q, k, v, causal=True)


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("with_sink", [False, True])
def test_no_rows_or_no_keys(device, lengths, with_sink):
    q, k, v = random_qkv(device, torch.float32, 2, *lengths)
    sink = torch.randn(4, device=device) if with_sink else None
    out, lse, _ = flash_attn_func(q, k, v, s_aux=sink, return_attn_probs=True)
    assert torch.equal(out, torch.zeros_like(q))
    expected = torch.full((4,), math.inf, device=device) if sink is None else sink
    assert torch.equal(lse, expected[None, :, None].expand(2, 4, lengths[0]))


def test_empty_batch(device):
    q, k, v = random_qkv(device, torch.float32, 0)
    assert flash_attn_func(q, k, v).shape == q.shape


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_float32_is_within_a_millionth(device, dim):
    q, k, v = random_qkv(device, torch.float32, 1, 300, 300, dim=dim)
    for causal in (False, True):
        out = flash_attn_func(q, k, v, causal=causal)
        # The contract: 1e-6 on unit-normal inputs.
        assert error(out, exact(q, k, v, causal=causal).out) <= 1e-6


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("factor", [1.0, 1e-25, 1e25])
def test_float32_rows_of_any_size(device, dim, factor):
    """Hopper's kernels scale each row by a power of two of its own."""
    q, k, v = random_qkv(device, torch.float32, 1, 200, 300, dim=dim)
    reach = torch.randint(-20, 21, (1, 300, 4, 1), generator=torch.Generator().manual_seed(1))
    v *= torch.exp2(reach.to(v)) * factor
    q, k = q * factor**-0.5, k * factor**0.5
    for window in ((-1, -1), (-1, 0), (30, 0)):
        out = flash_attn_func(q, k, v, window_size=window)
        expected = exact(q, k, v, window_size=window).out
        plain = attention_reference(q, k, v, window_size=window).out
        # What a row's terms add up to, where they are largest.
        summed = exact(q, k, v.abs(), window_size=window).out.amax(-1, keepdim=True)
        error_of_plain = float(((plain - expected) / summed).abs().max())
        assert float(((out - expected) / summed).abs().max()) <= 2 * error_of_plain + 1e-6


@pytest.mark.parametrize("dim", [64, 96, 256])
@pytest.mark.parametrize("softcap", [1e-7, 0.5, 8.0, 50.0, 1e7])
def test_softcap_of_any_size(device, dtype, dim, softcap):
    """On NVIDIA tanh has a short cut for small scores; Hopper asks raw scores whether a row's reference moves."""
    check(*rising_scores(device, dtype, dim), causal=True, softcap=softcap)


def test_strided_inputs(device):
    qkv = torch.randn(2, 4, 30, 3 * 40, device=device)  # heads before rows, q k v interleaved, rows padded
    q, k, v = (part.transpose(1, 2)[..., :32] for part in qkv.split(40, dim=-1))
    assert q.stride(-1) == 1 and not q.is_contiguous()
    out = flash_attn_func(q, k, v, causal=True)
    assert torch.equal(out, flash_attn_func(*(x.contiguous() for x in (q, k, v)), causal=True))


@pytest.mark.parametrize("name", ["full", "softcap", "alibi", "everything"])
@pytest.mark.parametrize("dim", [32, 64, 96, 128])
def test_unaligned_inputs(device, dtype, name, dim):
    """Rows that do not allow 16-byte access may take other kernels: the same bits."""
    memory = torch.randn(3 * 2 * 260 * 4 * dim + 1).to(device, dtype)
    q, k, v = memory[1:].view(3, 2, 260, 4, dim)
    arguments = {**feature(name, q), "dropout_p": 0.0 if name == "full" else 0.2}
    torch.manual_seed(1)
    unaligned = flash_attn_func(q, k, v, **arguments)
    torch.manual_seed(1)
    assert torch.equal(flash_attn_func(q.clone(), k.clone(), v.clone(), **arguments), unaligned)


def test_innermost_stride_is_repaired(device):
    q, k, v = random_qkv(device, torch.float32)
    transposed = [x.transpose(-1, -2).contiguous().transpose(-1, -2) for x in (q, k, v)]
    assert torch.equal(flash_attn_func(*transposed), flash_attn_func(q, k, v))
    q1, k1, v1 = (torch.randn(2, 9, 4, 5, device=device)[..., :1] for _ in range(3))
    odd = [x.as_strided(x.shape, (*x.stride()[:-1], 7)) for x in (q1, k1, v1)]
    assert torch.equal(flash_attn_func(*odd), flash_attn_func(*(x.clone() for x in (q1, k1, v1))))


def test_expanded_batch_and_heads(device):
    q, k, v = random_qkv(device, torch.float32, 1, heads_q=1)
    wide = [x.expand(3, -1, 4, -1) for x in (q, k, v)]
    assert torch.equal(flash_attn_func(*wide), flash_attn_func(*(x.contiguous() for x in wide)))


def test_negative_and_zero_scale(device):
    q, k, v = random_qkv(device, torch.float32)
    for scale in (-0.5, 0.0):
        check(q, k, v, softmax_scale=scale, causal=True)


def test_large_scores_do_not_overflow(device, dtype):
    q, k, v = random_qkv(device, dtype)
    check(q * 30, k * 30, v)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_scores_that_outgrow_those_before(device, dtype, dim, causal):
    """The softmax's reference moves with most blocks of keys, from negative scores up: the same bits in all kernels."""
    queries, keys = 70, 700
    memory = torch.randn(2 * queries * 2 * dim + 1).to(device, dtype)
    q = memory[1:].view(2, queries, 2, dim)  # rows that do not allow 16-byte access, as above
    k, v = torch.randn(2, 2, keys, 2, dim).to(device, dtype)
    q[..., 0] = 8
    k[..., 0] = torch.linspace(-4, 6, keys)[:, None] * dim**0.5
    check(q, k, v, causal=causal)
    assert torch.equal(flash_attn_func(q, k, v, causal=causal), flash_attn_func(q.clone(), k, v, causal=causal))


@pytest.mark.parametrize("name", ["full", "causal", "alibi"])
def test_packed_variants_are_the_same_function(device, dtype, name):
    qkv = torch.randn(2, 37, 3, 4, 32).to(device, dtype)
    q, k, v = qkv.unbind(2)
    arguments = feature(name, q)
    expected = flash_attn_func(q, k, v, **arguments)
    assert torch.equal(flash_attn_qkvpacked_func(qkv, **arguments), expected)
    assert torch.equal(flash_attn_kvpacked_func(q, qkv[:, :, 1:], **arguments), expected)


def test_grouped_kvpacked(device):
    q = torch.randn(2, 11, 6, 16, device=device)
    kv = torch.randn(2, 13, 2, 2, 16, device=device)
    assert torch.equal(flash_attn_kvpacked_func(q, kv), flash_attn_func(q, kv[:, :, 0], kv[:, :, 1]))


def test_without_dropout_s_dmask_is_empty(device):
    q, k, v = random_qkv(device, torch.float32)
    out, _, s_dmask = flash_attn_func(q, k, v, return_attn_probs=True)
    assert s_dmask.numel() == 0
    assert torch.equal(out, flash_attn_func(q, k, v))


def test_runs_repeat(device, dtype):
    q, k, v = random_qkv(device, dtype, 2, 130, 130)
    first = flash_attn_func(q, k, v, causal=True)
    assert all(torch.equal(flash_attn_func(q, k, v, causal=True), first) for _ in range(5))


@settings(max_examples=40, deadline=None)
@given(
    device=st.sampled_from(DEVICES),
    lengths=st.tuples(st.integers(0, 70), st.integers(0, 140)),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    dim=st.integers(1, 70),
    causal=st.booleans(),
    window=st.tuples(st.integers(-1, 80), st.integers(-1, 80)),
    softcap=st.sampled_from([0.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_any_combination(device, lengths, heads, dim, causal, window, softcap, seed):
    torch.manual_seed(seed)
    q, k, v = random_qkv(device, torch.float32, 2, *lengths, *heads, dim)
    check(q, k, v, causal=causal, window_size=window, softcap=softcap)


@settings(max_examples=20, deadline=None)
@given(
    device=st.sampled_from(DEVICES),
    seqlen=st.integers(1, 60),
    shift=st.floats(-20.0, 20.0),
    seed=st.integers(0, 1000),
)
def test_adding_a_constant_to_the_scores_changes_only_the_lse(device, seqlen, shift, seed):
    """softmax(s + c) = softmax(s): a constant in one more dimension of k shifts all scores of a row."""
    torch.manual_seed(seed)
    q, k, v = random_qkv(device, torch.float32, 1, seqlen, heads_q=1, dim=8)
    one, constant = q.new_ones(*q.shape[:-1], 1), k.new_full((*k.shape[:-1], 1), shift)
    shifted = torch.cat([q, one], -1), torch.cat([k, constant], -1), torch.cat([v, torch.zeros_like(one)], -1)
    out, lse, _ = flash_attn_func(q, k, v, softmax_scale=1.0, return_attn_probs=True)
    out_shifted, lse_shifted, _ = flash_attn_func(*shifted, softmax_scale=1.0, return_attn_probs=True)
    # Scores near 20 carry an absolute error of some 20 * 2^-23, and so then do the logarithms of probabilities.
    assert error(out_shifted[..., :8], out) < 1e-4
    assert error(lse_shifted, lse + shift) < 1e-4

"""The reference against torch's own attention, hand computations, and derivatives by differences."""

import math

import pytest
import torch
import torch.nn.functional as F
from helpers import FEATURES, cumulative, error, feature, random_packed, random_qkv

from flash_attn.reference import (
    attention_reference,
    flash_attention_backward,
    flash_attention_forward,
    visible_keys,
)

# Sums of a few hundred float64 terms of order 1, in two orders.
FLOAT64_NOISE = 1e-13


def sdpa(q, k, v, **arguments):
    """torch's math attention on [batch, seq, heads, dim]."""
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)), **arguments)
    return out.transpose(1, 2)


@pytest.mark.parametrize("heads_kv", [4, 2, 1])
def test_agrees_with_torch(heads_kv):
    q, k, v = random_qkv("cpu", torch.float64, seqlen_q=19, seqlen_k=23, heads_kv=heads_kv)
    expected = sdpa(q, k, v, enable_gqa=True)
    assert error(attention_reference(q, k, v).out, expected) < FLOAT64_NOISE


def test_causal_agrees_with_torch_for_equal_lengths():
    q, k, v = random_qkv("cpu", torch.float64)
    assert error(attention_reference(q, k, v, causal=True).out, sdpa(q, k, v, is_causal=True)) < FLOAT64_NOISE


def test_bias_and_window_agree_with_torch():
    q, k, v = random_qkv("cpu", torch.float64, seqlen_q=11, seqlen_k=17)
    slopes = torch.rand(4)
    bias = torch.empty(4, 11, 17, dtype=torch.float64)
    for i in range(11):
        for j in range(17):
            visible = i + 6 - 3 <= j <= i + 6 + 2
            bias[:, i, j] = -slopes.double() * abs(i + 6 - j) if visible else -math.inf
    expected = sdpa(q, k, v, attn_mask=bias, scale=0.7)
    actual = attention_reference(q, k, v, window_size=(3, 2), alibi_slopes=slopes, softmax_scale=0.7)
    assert error(actual.out, expected) < FLOAT64_NOISE


def test_causal_mask_is_aligned_to_the_bottom_right():
    assert visible_keys(2, 5, window_right=0).tolist() == [[True] * 4 + [False], [True] * 5]
    tall = visible_keys(5, 2, window_right=0)
    assert tall.tolist() == [[False, False]] * 3 + [[True, False], [True, True]]


def test_by_hand_with_softcap_and_sink():
    q = torch.tensor([2.0, 0.0], dtype=torch.float64).reshape(1, 1, 1, 2)
    k = torch.tensor([[1.0, 5.0], [-1.0, 7.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    v = torch.tensor([[10.0, 0.0], [0.0, 1.0]], dtype=torch.float64).reshape(1, 2, 1, 2)
    sink = torch.tensor([0.3], dtype=torch.float64)
    scores = [3.0 * math.tanh(0.5 * 2.0 / 3.0), 3.0 * math.tanh(-0.5 * 2.0 / 3.0)]
    total = sum(map(math.exp, scores)) + math.exp(0.3)
    result = attention_reference(q, k, v, softmax_scale=0.5, softcap=3.0, s_aux=sink)
    expected = [10.0 * math.exp(scores[0]) / total, math.exp(scores[1]) / total]
    assert result.out.flatten().tolist() == pytest.approx(expected, rel=1e-14)
    assert result.lse.item() == pytest.approx(math.log(total), rel=1e-14)


@pytest.mark.parametrize("sink", [None, -1.5])
def test_rows_that_see_nothing(sink):
    q, k, v = random_qkv("cpu", torch.float64, seqlen_q=5, seqlen_k=2, grad=True)
    s_aux = None if sink is None else torch.full((4,), sink, dtype=torch.float64, requires_grad=True)
    result = attention_reference(q, k, v, causal=True, s_aux=s_aux)
    assert torch.equal(result.out[:, :3], torch.zeros_like(result.out[:, :3]))
    assert (result.lse[..., :3] == (math.inf if sink is None else sink)).all()
    result.out.sum().backward()
    assert all(x.grad.isfinite().all() for x in (q, k, v))
    assert torch.equal(q.grad[:, :3], torch.zeros_like(q.grad[:, :3]))


@pytest.mark.parametrize("name", FEATURES)
def test_gradients_by_differences(name):
    q, k, v = random_qkv("cpu", torch.float64, batch=1, seqlen_q=5, seqlen_k=3, heads_q=2, heads_kv=1, dim=3, grad=True)
    arguments = feature(name, q)

    def finite_outputs(*inputs):
        result = attention_reference(*inputs, **arguments)
        return result.out, result.lse.masked_fill(result.lse == math.inf, 0.0)

    assert torch.autograd.gradcheck(finite_outputs, (q, k, v))


def test_sink_gradient_by_differences():
    q, k, v = random_qkv("cpu", torch.float64, batch=1, seqlen_q=4, seqlen_k=2, heads_q=2, dim=3, grad=True)
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(*inputs):
        return attention_reference(*inputs[:3], causal=True, s_aux=inputs[3])[:2]

    assert torch.autograd.gradcheck(run, (q, k, v, sink))


def test_packed_is_sequence_by_sequence():
    lengths_q, lengths_k = [3, 0, 7, 2], [5, 4, 7, 0]
    q, k, v, where = random_packed("cpu", torch.float64, lengths_q, lengths_k)
    result = attention_reference(q, k, v, causal=True, **where)
    at_q = at_k = 0
    for index, (n, m) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        one = [x[None] for x in (q[at_q : at_q + n], k[at_k : at_k + m], v[at_k : at_k + m])]
        alone = attention_reference(*one, causal=True)
        assert error(result.out[at_q : at_q + n], alone.out[0]) < FLOAT64_NOISE
        assert error(result.lse[:, at_q : at_q + n], alone.lse[0]) < FLOAT64_NOISE
        assert error(result.probabilities[index, :, :n, :m], alone.probabilities[0]) < FLOAT64_NOISE
        at_q, at_k = at_q + n, at_k + m


def test_unused_keys_are_not_there():
    q, k, v = random_qkv("cpu", torch.float64, seqlen_q=4, seqlen_k=9)
    used = torch.tensor([6, 0], dtype=torch.int32)
    expected = attention_reference(q[:1], k[:1, :6], v[:1, :6], causal=True)
    k[0, 6:], v[0, 6:] = torch.nan, torch.nan
    result = attention_reference(q, k, v, causal=True, seqused_k=used)
    assert error(result.out[:1], expected.out) < FLOAT64_NOISE
    assert torch.equal(result.out[1], torch.zeros_like(result.out[1]))


def test_dropout_mask_scales_what_it_keeps():
    q, k, v = random_qkv("cpu", torch.float64)
    keep = torch.rand(2, 4, 37, 37) > 0.3
    result = attention_reference(q, k, v, dropout_p=0.3, dropout_mask=keep)
    weights = result.probabilities * keep / 0.7
    assert error(result.out, torch.einsum("bhij,bjhd->bihd", weights, v)) < FLOAT64_NOISE
    assert error(result.probabilities, attention_reference(q, k, v).probabilities) == 0.0


def test_extra_mask():
    q, k, v = random_qkv("cpu", torch.float64)
    mask = torch.rand(2, 1, 37, 37) > 0.5
    assert error(attention_reference(q, k, v, mask=mask).out, sdpa(q, k, v, attn_mask=mask)) < FLOAT64_NOISE
    where = {name: cumulative([37], "cpu") for name in ("cu_seqlens_q", "cu_seqlens_k")}
    with pytest.raises(ValueError, match="mask: must be None for packed"):
        attention_reference(q[0], k[0], v[0], mask=mask, **where)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("lengths", [(50, 50), (20, 61), (61, 20), (1, 40)])
@pytest.mark.parametrize("split_size", [0, 16, 32])
def test_tiled_agrees_with_dense(causal, lengths, split_size):
    q, k, v = (x.transpose(1, 2) for x in random_qkv("cpu", torch.float64, 1, *lengths, grad=True))
    dense = attention_reference(*(x.transpose(1, 2) for x in (q, k, v)), causal=causal)
    tiles = {"causal": causal, "block_q": 8, "block_k": 16}
    out, lse = flash_attention_forward(q.detach(), k.detach(), v.detach(), split_size=split_size, **tiles)
    assert error(out.transpose(1, 2), dense.out) < FLOAT64_NOISE
    assert error(lse, dense.lse) < FLOAT64_NOISE
    dout = torch.randn_like(out)
    expected = torch.autograd.grad(dense.out, (q, k, v), dout.transpose(1, 2))
    actual = flash_attention_backward(dout, *(x.detach() for x in (q, k, v)), out, lse, **tiles)
    for got, wanted in zip(actual, expected, strict=True):
        assert error(got, wanted) < 10 * FLOAT64_NOISE  # two more products than the forward


def test_tiled_refuses_a_split_that_cuts_blocks():
    q, k, v = (x.transpose(1, 2) for x in random_qkv("cpu", torch.float32))
    with pytest.raises(ValueError, match="multiple of block_k"):
        flash_attention_forward(q, k, v, block_k=16, split_size=24)

"""A loss that uses the returned LSE."""

import pytest
import torch
from helpers import FEATURES, assert_gradients_accurate, exact, feature, gradients, longest, random_packed, random_qkv

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func, flash_attn_varlen_func
from flash_attn.reference import attention_reference


@pytest.mark.parametrize("use_out", [False, True])
@pytest.mark.parametrize("name", FEATURES)
def test_features(device, dtype, name, use_out):
    q, k, v = random_qkv(device, dtype, seqlen_q=40, seqlen_k=60, heads_kv=2, grad=True)
    arguments = feature(name, q)
    inputs = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    outputs = flash_attn_func(q, k, v, **arguments, return_attn_probs=True)[:2]
    plain = attention_reference(q, k, v, **arguments)[:2]
    expected = exact(*inputs, **arguments)[:2]
    upstream = [torch.randn(x.shape).to(x) for x in outputs]
    first = 0 if use_out else 1
    found = gradients(outputs[first:], (q, k, v), *upstream[first:])
    rough = gradients(plain[first:], (q, k, v), *upstream[first:])
    wanted = gradients(expected[first:], inputs, *(x.double() for x in upstream[first:]))
    # The LSE's gradient enters the difference that dout enters: dS = P * (dP - delta + dlse).
    assert_gradients_accurate(found, rough, wanted, (q, k, v), upstream[0], arguments.get("softmax_scale"))


def test_by_differences_on_the_real_kernels():
    q, k, v = random_qkv("cpu", torch.float64, 1, 4, 6, heads_q=2, heads_kv=1, dim=3, grad=True)
    qkv = torch.randn(1, 5, 3, 2, 3, dtype=torch.float64, requires_grad=True)
    kv = torch.randn(1, 5, 2, 1, 3, dtype=torch.float64, requires_grad=True)
    both = {"causal": True, "return_attn_probs": True}
    assert torch.autograd.gradcheck(lambda *x: flash_attn_func(*x, **both)[:2], (q, k, v))
    assert torch.autograd.gradcheck(lambda x: flash_attn_qkvpacked_func(x, **both)[:2], (qkv,))
    assert torch.autograd.gradcheck(lambda *x: flash_attn_kvpacked_func(*x, **both)[1], (q, kv))


def test_packed(device):
    lengths = [30, 1, 17]
    q, k, v, where = random_packed(device, torch.float32, lengths, lengths, grad=True)
    lse = flash_attn_varlen_func(q, k, v, **where, **longest(lengths, lengths), causal=True, return_attn_probs=True)[1]
    dlse = torch.randn(lse.shape).to(lse)
    inputs = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    wanted = gradients(exact(*inputs, **where, causal=True).lse, inputs, dlse.double())
    rough = gradients(attention_reference(q, k, v, **where, causal=True).lse, (q, k, v), dlse)
    assert_gradients_accurate(gradients(lse, (q, k, v), dlse), rough, wanted, (q, k, v), dlse)


@pytest.mark.parametrize("dim", [64, 96, 128, 256])
def test_rows_whose_output_does_not_count(device, dtype, dim):
    """Their dout is 0, and says nothing about how large their dS is."""
    q, k, v = random_qkv(device, dtype, seqlen_q=100, seqlen_k=140, dim=dim, grad=True)
    outputs = flash_attn_func(q, k, v, return_attn_probs=True)[:2]
    dout, dlse = (torch.randn(x.shape).to(x) for x in outputs)
    dout[:, ::3] = 0
    inputs = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    wanted = gradients(exact(*inputs)[:2], inputs, dout.double(), dlse.double())
    rough = gradients(attention_reference(q, k, v)[:2], (q, k, v), dout, dlse)
    assert_gradients_accurate(gradients(outputs, (q, k, v), dout, dlse), rough, wanted, (q, k, v), dout)


def test_combining_halves_by_their_lse(device):
    """What ring attention does: two halves of the keys, merged by their LSE, are the whole; gradients too."""
    q, k, v = random_qkv(device, torch.float32, seqlen_q=20, seqlen_k=64, grad=True)
    halves = [
        flash_attn_func(q, k[:, part], v[:, part], return_attn_probs=True)[:2] for part in (slice(0, 40), slice(40, 64))
    ]
    lse = torch.stack([half[1] for half in halves])
    weights = torch.softmax(lse, 0).transpose(-1, -2).unsqueeze(-1)
    merged = weights[0] * halves[0][0] + weights[1] * halves[1][0]
    whole = flash_attn_func(q, k, v)
    assert torch.allclose(merged, whole, atol=2e-6)  # twice the float32 contract
    dout = torch.randn(whole.shape).to(whole)
    for got, wanted in zip(gradients(merged, (q, k, v), dout), gradients(whole, (q, k, v), dout), strict=True):
        assert torch.allclose(got, wanted, atol=2e-5)  # gradients of order 10

"""Attention sinks (s_aux): their gradient, and their edges. test_forward and test_backward cover the rest."""

import math

import pytest
import torch
from helpers import assert_forward_accurate, exact, gradients, longest, random_packed, random_qkv

from flash_attn import flash_attn_func, flash_attn_varlen_func
from flash_attn.reference import attention_reference


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("sink_dtype", [torch.float32, torch.bfloat16])
def test_gradient(device, dtype, causal, sink_dtype):
    q, k, v = random_qkv(device, dtype, seqlen_q=50, seqlen_k=30, heads_kv=2, grad=True)
    sink = torch.randn(4).to(device, sink_dtype).requires_grad_()
    out = flash_attn_func(q, k, v, causal=causal, s_aux=sink)
    dout = torch.randn(out.shape).to(out)
    (actual,) = gradients(out, (sink,), dout)
    assert actual.dtype == sink_dtype
    (plain,) = gradients(attention_reference(q, k, v, causal=causal, s_aux=sink).out, (sink,), dout)
    wide = sink.detach().double().requires_grad_()
    (expected,) = gradients(exact(q, k, v, causal=causal, s_aux=wide).out, (wide,), dout.double())
    # The formula reads the rounded out and takes differences of large sums (rowsum(dout * out) over 100 rows).
    floor = 100 * q.shape[-1] ** 0.5 * torch.finfo(dtype).eps * float(out.detach().abs().max())
    assert float((actual.double() - expected).abs().max()) <= 2 * float((plain.double() - expected).abs().max()) + floor


@pytest.mark.parametrize("with_lse", [False, True])
def test_by_differences_on_the_real_kernels(with_lse):
    q, k, v = random_qkv("cpu", torch.float64, 1, 5, 3, heads_q=2, dim=3, grad=True)
    sink = torch.randn(2, dtype=torch.float64, requires_grad=True)

    def run(q, k, v, sink):
        out, lse, _ = flash_attn_func(q, k, v, causal=True, s_aux=sink, return_attn_probs=True)
        return (out, lse) if with_lse else out

    assert torch.autograd.gradcheck(run, (q, k, v, sink))


def test_packed_gradient(device):
    lengths_q, lengths_k = [5, 30, 17], [40, 0, 9]
    q, k, v, where = random_packed(device, torch.float32, lengths_q, lengths_k)
    sink = torch.randn(4, device=device, requires_grad=True)
    # Rows of no sequence, with garbage in them, add nothing.
    q, k, v = (torch.cat([x, torch.full_like(x[:3], torch.nan)]) for x in (q, k, v))
    arguments = {**where, "causal": True, "s_aux": sink}
    out, lse, _ = flash_attn_varlen_func(q, k, v, **arguments, **longest(lengths_q, lengths_k), return_attn_probs=True)
    loss = out[:52].square().sum() + lse[:, :52].sum()
    (actual,) = gradients(loss, (sink,), torch.ones_like(loss))
    wide = sink.detach().double().requires_grad_()
    result = exact(q, k, v, **(arguments | {"s_aux": wide}))
    loss = result.out[:52].square().sum() + result.lse[:, :52].sum()
    (expected,) = gradients(loss, (wide,), torch.ones_like(loss))
    assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5)  # float32 sums over 52 rows of order 1


def test_no_sink_is_a_sink_of_minus_infinity(device):
    q, k, v = random_qkv(device, torch.float32, seqlen_q=9, seqlen_k=5)
    sink = torch.full((4,), -math.inf, device=device, requires_grad=True)
    out = flash_attn_func(q, k, v, causal=True, s_aux=sink)
    assert torch.equal(out, flash_attn_func(q, k, v, causal=True))
    out.sum().backward()
    assert torch.equal(sink.grad, torch.zeros_like(sink))


def test_overwhelming_sink_takes_everything(device, dtype):
    q, k, v = random_qkv(device, dtype, grad=True)
    sink = torch.full((4,), 5000.0, device=device)  # exp(-5000) is 0 in float64 too
    out, lse, _ = flash_attn_func(q, k, v, s_aux=sink, return_attn_probs=True)
    assert torch.equal(out, torch.zeros_like(out))
    assert (lse == 5000.0).all()
    out.sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (q, k, v))


def test_sink_counts_once_however_the_keys_are_split(device):
    """Chunks are folded, and the sink enters the row's sum once."""
    from flash_attn import deterministic_mode, modes

    q, k, v = random_qkv(device, torch.float32, 1, 20, 600)
    sink = torch.randn(4, device=device)
    expected = exact(q, k, v, s_aux=sink)
    with deterministic_mode(True, modes.key_block(device, "float32", 32)):
        out, lse, _ = flash_attn_func(q, k, v, s_aux=sink, return_attn_probs=True)
    plain = attention_reference(q, k, v, s_aux=sink)
    assert_forward_accurate((out, lse), plain, expected)

"""Gradients of the padded functions: against the reference, by differences, and in memory."""

import pytest
import torch
from helpers import DEVICES, FEATURES, assert_gradients_accurate, exact, feature, gradients, random_qkv, rising_scores
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from flash_attn import flash_attn_func, flash_attn_kvpacked_func, flash_attn_qkvpacked_func
from flash_attn.reference import attention_reference


def check(q, k, v, **arguments):
    """Compares dq, dk, dv with those of the definition."""
    out = flash_attn_func(q, k, v, **arguments)
    dout = torch.randn(out.shape).to(out)
    actual = gradients(out, (q, k, v), dout)
    plain = gradients(attention_reference(q, k, v, **arguments).out, (q, k, v), dout)
    inputs = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    expected = gradients(exact(*inputs, **arguments).out, inputs, dout.double())
    assert_gradients_accurate(actual, plain, expected, (q, k, v), dout, arguments.get("softmax_scale"))


@pytest.mark.parametrize("name", FEATURES)
def test_features(device, dtype, name):
    q, k, v = random_qkv(device, dtype, seqlen_q=45, seqlen_k=83, heads_kv=2, grad=True)
    check(q, k, v, **feature(name, q))


@pytest.mark.parametrize("dim", [64, 128, 256])
@pytest.mark.parametrize("softcap", [0.5, 8.0, 50.0, 1e7])
def test_softcap_of_any_size(device, dtype, dim, softcap):
    check(*rising_scores(device, dtype, dim, grad=True), causal=True, softcap=softcap)


@pytest.mark.parametrize("dim", [64, 96, 128, 192, 256])
@pytest.mark.parametrize("factor", [1.0, 1e-8, 1e8])
def test_float32_rows_of_any_size(device, dim, factor):
    """Hopper's kernels scale rows and tiles by powers of two."""
    q, k, v = random_qkv(device, torch.float32, 1, 150, 200, heads_q=2, dim=dim)
    generator = torch.Generator().manual_seed(1)
    dout = torch.randn(q.shape).to(q)
    for x in (v, dout):
        x *= torch.exp2(torch.randint(-12, 13, (*x.shape[:3], 1), generator=generator).to(x)) * factor
    q, k = q * factor, k / factor
    actual, plain, expected = [], [], []
    for found, call, element in (
        (actual, flash_attn_func, torch.float32),
        (plain, lambda *x, **settings: attention_reference(*x, **settings).out, torch.float32),
        (expected, lambda *x, **settings: attention_reference(*x, **settings).out, torch.float64),
    ):
        leaves = tuple(x.detach().to(element).requires_grad_() for x in (q, k, v))
        found += gradients(call(*leaves, causal=True), leaves, dout.to(element))

    # What the terms add up to: dS = P * (dO V^T - delta), each product at its largest.
    q, k, v, dout = (x.double().transpose(1, 2) for x in (q, k, v, dout))
    hidden = torch.ones(150, 200, dtype=torch.bool, device=device).triu(51)
    p = (q @ k.mT * dim**-0.5).masked_fill(hidden, -torch.inf).softmax(-1)
    ds = p * (dout.abs() @ v.abs().mT + (dout.abs() * (p @ v.abs())).sum(-1, keepdim=True)) * dim**-0.5
    sizes = ds @ k.abs(), ds.mT @ q.abs(), p.mT @ dout.abs()
    for name, got, rough, wanted, size in zip(("dq", "dk", "dv"), actual, plain, expected, sizes, strict=True):
        size = size.transpose(1, 2).amax(-1, keepdim=True)  # of a row
        if name == "dq":  # of a query, by its dout; else as large as the largest
            of_query = dout.abs().amax(-1, keepdim=True).transpose(1, 2)
            size = of_query * (size / of_query).amax(1, keepdim=True)
        limit = 2 * float(((rough - wanted) / size).abs().max()) + 1e-6
        assert float(((got - wanted) / size).abs().max()) <= limit, name


@pytest.mark.parametrize("name", ["full", "causal", "everything"])
@pytest.mark.parametrize("lengths", [(1, 1), (1, 150), (64, 64), (65, 63), (129, 128), (150, 7), (257, 300)])
@pytest.mark.parametrize(
    "element, dim",
    [
        ("float32", 32),
        ("float32", 64),
        ("float32", 96),
        ("float32", 128),
        ("float32", 256),
        ("bfloat16", 64),
        ("float16", 96),
        ("float16", 128),
        ("bfloat16", 192),
        ("bfloat16", 256),
    ],
)
def test_lengths(device, lengths, name, element, dim):
    q, k, v = random_qkv(device, getattr(torch, element), 2, *lengths, heads_q=2, dim=dim, grad=True)
    check(q, k, v, **feature(name, q))


@pytest.mark.parametrize("dim", [1, 3, 8, 20, 40, 64, 72, 96, 128, 192, 255, 256])
def test_head_dims(device, dim):
    for dtype in (torch.float32, torch.bfloat16):
        q, k, v = random_qkv(device, dtype, 1, 33, 70, heads_q=2, dim=dim, grad=True)
        check(q, k, v, causal=True)


@pytest.mark.parametrize("heads", [(1, 1), (6, 2), (5, 1)])
@pytest.mark.parametrize("deterministic", [False, True])
def test_grouped_heads(device, heads, deterministic):
    q, k, v = random_qkv(device, torch.float32, 1, 50, 70, *heads, grad=True)
    out = flash_attn_func(q, k, v, causal=True, deterministic=deterministic)
    dout = torch.randn(out.shape).to(out)
    inputs = tuple(x.detach().double().requires_grad_() for x in (q, k, v))
    expected = gradients(exact(*inputs, causal=True).out, inputs, dout.double())
    plain = gradients(attention_reference(q, k, v, causal=True).out, (q, k, v), dout)
    assert_gradients_accurate(gradients(out, (q, k, v), dout), plain, expected, (q, k, v), dout)


@pytest.mark.parametrize("name", FEATURES)
def test_by_differences_on_the_real_kernels(name):
    q, k, v = random_qkv("cpu", torch.float64, 1, 5, 4, heads_q=2, heads_kv=1, dim=3, grad=True)
    arguments = feature(name, q)
    assert torch.autograd.gradcheck(lambda *inputs: flash_attn_func(*inputs, **arguments), (q, k, v))


@pytest.mark.parametrize("lengths", [(0, 5), (5, 0)])
def test_no_rows_or_no_keys(device, lengths):
    q, k, v = random_qkv(device, torch.float32, 2, *lengths, grad=True)
    flash_attn_func(q, k, v).sum().backward()
    assert all(torch.equal(x.grad, torch.zeros_like(x)) for x in (q, k, v))


def test_rows_that_see_nothing_get_no_gradient(device, dtype):
    """Whole blocks of queries among them, to whose dQ nobody adds."""
    q, k, v = random_qkv(device, dtype, 1, 300, 20, grad=True)
    flash_attn_func(q, k, v, causal=True).sum().backward()
    assert torch.equal(q.grad[:, :280], torch.zeros_like(q.grad[:, :280]))
    assert all(x.grad.isfinite().all() for x in (q, k, v))


@pytest.mark.parametrize("slots", [2, 3])
def test_packed_gradient_equals_that_of_the_parts(device, dtype, slots):
    packed = torch.randn(2, 37, slots, 4, 32).to(device, dtype).requires_grad_()
    q = torch.randn(2, 37, 4, 32).to(device, dtype).requires_grad_()
    dout = torch.randn(2, 37, 4, 32).to(device, dtype)
    if slots == 3:
        actual = gradients(flash_attn_qkvpacked_func(packed, causal=True, deterministic=True), (packed,), dout)
        parts = tuple(part.detach().requires_grad_() for part in packed.unbind(2))
        expected = [torch.stack(gradients(flash_attn_func(*parts, causal=True, deterministic=True), parts, dout), 2)]
    else:
        actual = gradients(flash_attn_kvpacked_func(q, packed, causal=True, deterministic=True), (q, packed), dout)
        parts = q, *(part.detach().requires_grad_() for part in packed.unbind(2))
        dq, dk, dv = gradients(flash_attn_func(*parts, causal=True, deterministic=True), parts, dout)
        expected = [dq, torch.stack([dk, dv], 2)]
    assert all(torch.equal(got, wanted) for got, wanted in zip(actual, expected, strict=True))


class RecordOperators(TorchDispatchMode):
    """The names of the operators that run inside."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(str(func))
        return func(*args, **(kwargs or {}))


def test_packed_gradient_is_one_tensor(device):
    """No stack of three gradients: what arrives is the very memory the kernel wrote."""
    qkv = torch.randn(2, 16, 3, 2, 32, device=device, requires_grad=True)
    seen = []
    qkv.register_hook(seen.append)
    flash_attn_qkvpacked_func(qkv).sum().backward()
    assert seen[0].is_contiguous() and seen[0].shape == qkv.shape
    out = flash_attn_qkvpacked_func(qkv)
    with RecordOperators() as operators:
        torch.autograd.grad(out, qkv, torch.ones_like(out))
    assert any("flash_attn" in name for name in operators.names)
    assert not any(copy in name for name in operators.names for copy in ("stack", "cat", "copy", "select_backward"))


@pytest.mark.parametrize("needed", [0, 1, 2])
def test_only_some_inputs_need_gradients(device, needed):
    inputs = list(random_qkv(device, torch.float32))
    inputs[needed].requires_grad_()
    flash_attn_func(*inputs).square().sum().backward()
    everything = [x.detach().clone().requires_grad_() for x in inputs]
    flash_attn_func(*everything, deterministic=True).square().sum().backward()
    assert torch.allclose(inputs[needed].grad, everything[needed].grad, atol=1e-5)  # order of sums may differ


def test_strided_inputs_and_upstream(device):
    base = torch.randn(2, 4, 30, 96, device=device, requires_grad=True)
    q, k, v = (part.transpose(1, 2) for part in base.split(32, dim=-1))
    out = flash_attn_func(q, k, v, deterministic=True)
    upstream = torch.randn(2, 4, 30, 32, device=device).transpose(1, 2)
    (strided,) = gradients(out, (base,), upstream)
    dense = base.detach().clone().requires_grad_()
    q, k, v = (part.transpose(1, 2).contiguous() for part in dense.split(32, dim=-1))
    (expected,) = gradients(flash_attn_func(q, k, v, deterministic=True), (dense,), upstream.contiguous())
    assert torch.equal(strided, expected)


def test_second_derivative_is_refused(device):
    q, k, v = random_qkv(device, torch.float32, grad=True)
    (dq,) = torch.autograd.grad(flash_attn_func(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


def test_forward_mode_is_refused(device):
    """Rather than a derivative of zero."""
    q, k, v = random_qkv(device, torch.float32)
    for attend in (flash_attn_func, lambda *inputs: flash_attn_qkvpacked_func(torch.stack(inputs, 2))):
        with pytest.raises(NotImplementedError, match="forward-mode"):
            torch.func.jvp(attend, (q, k, v), tuple(torch.randn_like(x) for x in (q, k, v)))


@settings(max_examples=25, deadline=None)
@given(
    device=st.sampled_from(DEVICES),
    lengths=st.tuples(st.integers(1, 70), st.integers(1, 140)),
    heads=st.sampled_from([(1, 1), (2, 1), (4, 2)]),
    dim=st.integers(1, 70),
    causal=st.booleans(),
    window=st.tuples(st.integers(-1, 80), st.integers(-1, 80)),
    softcap=st.sampled_from([0.0, 4.0]),
    seed=st.integers(0, 1000),
)
def test_any_combination(device, lengths, heads, dim, causal, window, softcap, seed):
    torch.manual_seed(seed)
    q, k, v = random_qkv(device, torch.float32, 2, *lengths, *heads, dim, grad=True)
    check(q, k, v, causal=causal, window_size=window, softcap=softcap)


def test_more_than_2_31_elements(cuda_only):
    """Offsets are 64 bits wide: the last keys of a cache of 2.2e9 elements, forward and backward."""
    if torch.cuda.get_device_properties(cuda_only).total_memory < 40 * 2**30:
        pytest.skip("needs 40 GiB of device memory")
    seqlen, heads, dim, window = 270_080, 64, 128, 100  # keys in whole blocks, so that the tail is cut alike
    q = torch.randn(1, 5, heads, dim, device=cuda_only, dtype=torch.bfloat16, requires_grad=True)
    k, v = (torch.zeros(1, seqlen, heads, dim, device=cuda_only, dtype=torch.bfloat16) for _ in range(2))
    assert k.numel() > 2**31
    for x in (k, v):
        x[:, -256:].normal_()
        x.requires_grad_()
    dout = torch.randn_like(q)
    arguments = {"causal": True, "window_size": (window, 0), "deterministic": True}
    out = flash_attn_func(q, k, v, **arguments)
    found = gradients(out, (q, k, v), dout)
    tail = [x[:, -256:].detach().clone().requires_grad_() for x in (k, v)]
    expected_out = flash_attn_func(q, *tail, **arguments)
    expected = gradients(expected_out, (q, *tail), dout)
    assert torch.equal(out, expected_out)
    assert torch.equal(found[0], expected[0])
    for actual, wanted in zip(found[1:], expected[1:], strict=True):
        assert torch.equal(actual[:, -256:], wanted)
        assert not actual[:, :-256].any()

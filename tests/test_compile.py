"""torch.compile, opcheck, and shape propagation without data."""

import pytest
import torch
from helpers import cumulative, random_packed, random_qkv

from flash_attn import (
    _ops,
    deterministic_mode,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
)


def compiled(function, dynamic=False, backend="aot_eager"):
    """AOT autograd with no code generation: what this package is responsible for."""
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


def same_with_gradients(function, inputs, **options):
    """Compiled and eager agree bit for bit, in outputs and gradients."""
    fast = compiled(function, **options)
    results = []
    for run in (function, fast):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        torch.manual_seed(1)
        out = run(*leaves)
        out.square().sum().backward()
        results.append((out, *(x.grad for x in leaves)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("dynamic", [False, True])
def test_padded(device, dynamic):
    q, k, v = random_qkv(device, torch.float32, heads_kv=2)
    sink = torch.randn(4, device=device)

    def attend(q, k, v, sink):
        return flash_attn_func(q, k, v, causal=True, window_size=(8, 8), s_aux=sink, deterministic=True)

    same_with_gradients(attend, (q, k, v, sink), dynamic=dynamic)


def test_dropout(device):
    q, k, v = random_qkv(device, torch.float32)
    same_with_gradients(lambda *x: flash_attn_func(*x, dropout_p=0.2, deterministic=True), (q, k, v))


def test_loss_on_the_lse(device):
    q, k, v = random_qkv(device, torch.float32)
    same_with_gradients(lambda *x: flash_attn_func(*x, deterministic=True, return_attn_probs=True)[1], (q, k, v))


@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_layouts(device, dynamic):
    qkv = torch.randn(2, 20, 3, 4, 32, device=device)
    same_with_gradients(
        lambda x: flash_attn_qkvpacked_func(x, causal=True, deterministic=True), (qkv,), dynamic=dynamic
    )
    q, kv = qkv[:, :, 0], qkv[:, :, 1:]
    same_with_gradients(lambda *x: flash_attn_kvpacked_func(*x, deterministic=True), (q, kv), dynamic=dynamic)


@pytest.mark.parametrize("dynamic", [False, True])
def test_packed_sequences(device, dynamic):
    q, k, v, where = random_packed(device, torch.float32, [7, 12], [9, 12])

    def attend(q, k, v):
        return flash_attn_varlen_func(q, k, v, **where, max_seqlen_q=12, max_seqlen_k=12, deterministic=True)

    same_with_gradients(attend, (q, k, v), dynamic=dynamic)


def test_lengths_that_change_do_not_recompile(device):
    counter = torch._dynamo.testing.CompileCounter()
    fast = compiled(lambda *x: flash_attn_func(*x, causal=True), dynamic=True, backend=counter)
    for seqlen in (12, 20, 33):
        q, k, v = random_qkv(device, torch.float32, 2, seqlen)
        assert torch.equal(fast(q, k, v), flash_attn_func(q, k, v, causal=True))
    assert counter.frame_count == 1


def test_mode_is_guarded(device):
    q, k, v = random_qkv(device, torch.float32, 2, 20, 300)
    fast = compiled(lambda *x: flash_attn_func(*x))
    block = torch.ops.flash_attn.key_block(device, "float32", 32)
    for split in (None, block, 2 * block, None):
        with deterministic_mode(True, split):
            assert torch.equal(fast(q, k, v), flash_attn_func(q, k, v))


@pytest.mark.parametrize("in_pages", [False, True])
@pytest.mark.parametrize("rotates", [False, True])
def test_decoding_step(device, rotates, in_pages):
    tables = [torch.rand(40, 8, device=device) for _ in "cs"] if rotates else [None, None]
    places = torch.tensor([[0], [1]], dtype=torch.int32, device=device) if in_pages else None

    def step(q, k_cache, v_cache, k, v, used):
        settings = {"cache_seqlens": used, "block_table": places, "causal": True}
        return flash_attn_with_kvcache(q, k_cache, v_cache, k, v, *tables, **settings)

    fast = compiled(step)
    results = []
    for run in (step, fast):
        torch.manual_seed(2)
        k_cache, v_cache = (torch.randn(2, 40, 2, 16, device=device) for _ in range(2))
        q, k, v = random_qkv(device, torch.float32, 2, 1, heads_kv=2, dim=16)
        used = torch.tensor([3, 11], dtype=torch.int32, device=device)
        results.append((run(q, k_cache, v_cache, k, v, used), k_cache, v_cache))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_code_generation(device):
    """One run through inductor, with work before and after to fuse."""
    q, k, v = random_qkv(device, torch.float32)

    def model(q, k, v):
        return torch.relu(flash_attn_func(q * 2.0, k, v, causal=True)) + 1.0

    fast = compiled(model, backend="inductor")
    assert torch.allclose(fast(q, k, v), model(q, k, v), atol=1e-6)  # inductor may reorder float32 arithmetic


def operator_arguments(device, packed, dropout_p=0.0, grad=True):
    if packed:
        q, k, v, where = random_packed(device, torch.float32, [5, 9], [7, 9], grad=grad)
        q_longest, k_longest = 9, 9
    else:
        q, k, v = random_qkv(device, torch.float32, 2, 9, 11, heads_kv=2, grad=grad)
        where, q_longest, k_longest = {}, 9, 11
    sink = torch.randn(4, device=device, requires_grad=grad)
    rng_state = torch.tensor([3, 5], device=device) if dropout_p else None
    tensors = _ops.Tensors(**where, sink=sink, rng_state=rng_state)
    options = _ops.Options(
        q_longest, k_longest, 0.2, window_right=0, dropout_p=dropout_p, return_s_dmask=dropout_p > 0, deterministic=True
    )
    return (q, k, v), tensors, options


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_opcheck_forward(device, packed, dropout_p):
    inputs, tensors, options = operator_arguments(device, packed, dropout_p)
    torch.library.opcheck(torch.ops.flash_attn.forward.default, (*inputs, *tensors, *options))


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_backward(device, packed):
    (q, k, v), tensors, options = operator_arguments(device, packed, grad=False)
    out, lse, _ = _ops.forward(q, k, v, tensors, options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    found = [torch.empty_like(x) for x in (q, k, v)]
    scalars = (9, options.max_seqlen_k, 0.2, -1, 0, 0.0, 0.0, True, False)
    arguments = (dout, dlse, q, k, v, out, lse, *found, *tensors, *scalars)
    torch.library.opcheck(torch.ops.flash_attn.backward.default, arguments)


@pytest.mark.parametrize("packed", [False, True])
def test_opcheck_attend_pages(device, packed):
    (q, _, _), tensors, options = operator_arguments(device, packed, grad=False)
    pages = (torch.randn(12, 3, 2 if not packed else q.shape[-2], q.shape[-1], device=device) for _ in "kv")
    table = torch.randperm(8, device=device).view(2, 4).int()
    torch.library.opcheck(torch.ops.flash_attn.attend_pages.default, (q, *pages, table, *tensors, *options))


@pytest.mark.parametrize("rotates", [False, True])
def test_opcheck_append(device, rotates):
    q, k, v = random_qkv(device, torch.float32, 2, 3, heads_kv=2, dim=16)
    caches = (torch.zeros(2, 20, 2, 16, device=device) for _ in "kv")
    used = torch.tensor([3, 11], dtype=torch.int32, device=device)
    tables = (torch.rand(20, 8, device=device) for _ in "cs") if rotates else (None, None)
    arguments = (q, k, v, *caches, used, None, *tables, False, True)
    torch.library.opcheck(torch.ops.flash_attn.append.default, arguments)


def test_meta_tensors_propagate_shapes():
    q, k, v = (torch.empty(2, 5, heads, 64, device="meta", dtype=torch.bfloat16) for heads in (8, 2, 2))
    out, lse, s_dmask = flash_attn_func(q, k, v, dropout_p=0.1, return_attn_probs=True)
    assert out.shape == q.shape and out.dtype == torch.bfloat16 and out.is_meta
    assert lse.shape == (2, 8, 5) and lse.dtype == torch.float32
    assert s_dmask.shape == (2, 8, 5, 5)
    packed = [x.flatten(0, 1) for x in (q, k, v)]
    at = cumulative([5, 5], "meta")
    out, lse, _ = flash_attn_varlen_func(*packed, at, at, 5, 5, return_attn_probs=True)
    assert out.shape == (10, 8, 64) and lse.shape == (8, 10)

"""The gfx90a kernels, as compiled, against float64. The emulator checks bounds, LDS races, uninitialised values too."""

import pytest
import torch
from emulator import DTYPES, Problem
from helpers import (
    FEATURES,
    assert_accurate,
    assert_forward_accurate,
    assert_gradients_accurate,
    exact,
    feature,
    gradients,
    longest,
    random_packed,
    random_qkv,
)

from flash_attn.ops.triton.rotary import apply_rotary
from flash_attn.reference import attention_reference

FLOATS = pytest.mark.parametrize("dtype", list(DTYPES), ids=DTYPES.values())
HEAD_DIMS = (32, 64, 96, 128, 192, 256)


def check(emulator, q, k, v, problem_only=None, with_dlse=False, deterministic=False, **arguments):
    """Forward and backward of one call against the reference. Returns out, lse and the gradients."""
    problem = Problem(q, k, v, **arguments, **(problem_only or {}))
    out, lse, _ = emulator.forward(problem)
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    roughs = [x.detach().clone().requires_grad_() for x in (q, k, v)]
    expected, plain = exact(*inputs, **arguments), attention_reference(*roughs, **arguments)
    assert_forward_accurate((out, lse), plain, expected)

    dout = torch.randn(out.shape).to(out.dtype)
    dlse = torch.randn(lse.shape) if with_dlse else None
    found = emulator.backward(problem, dout, out, lse, dlse, deterministic)
    outputs = ((plain.out, plain.lse), (expected.out, expected.lse)) if with_dlse else ((plain.out,), (expected.out,))
    upstream = (dout, dlse) if with_dlse else (dout,)
    rough = gradients(outputs[0], tuple(roughs), *upstream)
    wanted = gradients(outputs[1], tuple(inputs), *(x.double() for x in upstream))
    assert_gradients_accurate(found, rough, wanted, (q, k, v), dout, arguments.get("softmax_scale"))
    return out, lse, found


@FLOATS
@pytest.mark.parametrize("dim", HEAD_DIMS)
def test_head_dims(emulator, dtype, dim):
    """Ragged lengths: more than one block of queries and keys, the last ones partly filled; grouped heads."""
    q, k, v = random_qkv("cpu", dtype, batch=1, seqlen_q=150, seqlen_k=203, heads_q=2, heads_kv=1, dim=dim)
    check(emulator, q, k, v, causal=True)


@FLOATS
@pytest.mark.parametrize("name", FEATURES)
def test_features(emulator, dtype, name):
    q, k, v = random_qkv("cpu", dtype, batch=2, seqlen_q=45, seqlen_k=70, heads_q=4, heads_kv=2, dim=64)
    check(emulator, q, k, v, **feature(name, q))


@FLOATS
@pytest.mark.parametrize(("seqlen_q", "seqlen_k"), [(1, 1), (1, 300), (33, 1), (129, 65), (64, 64), (70, 20)])
def test_lengths(emulator, dtype, seqlen_q, seqlen_k):
    """One row, one key, whole blocks and one more; with more queries than keys some rows see nothing."""
    q, k, v = random_qkv("cpu", dtype, 1, seqlen_q, seqlen_k, heads_q=1, dim=64)
    check(emulator, q, k, v, causal=True)


@FLOATS
@pytest.mark.parametrize("dim", [1, 8, 40, 80, 133])
def test_any_head_dim(emulator, dtype, dim):
    """Columns beyond the head dimension, 16-byte access possible (8, 40, 80) or not."""
    q, k, v = random_qkv("cpu", dtype, 1, 40, 50, heads_q=2, heads_kv=1, dim=dim)
    check(emulator, q, k, v, causal=True)


@FLOATS
def test_packed(emulator, dtype):
    lengths_q, lengths_k = [5, 0, 130, 17], [40, 30, 131, 2]
    q, k, v, where = random_packed("cpu", dtype, lengths_q, lengths_k, dim=64)
    check(emulator, q, k, v, longest(lengths_q, lengths_k), causal=True, **where)


@FLOATS
def test_seqused_k(emulator, dtype):
    q, k, v = random_qkv("cpu", dtype, batch=3, seqlen_q=20, seqlen_k=150, heads_q=2, dim=64)
    check(emulator, q, k, v, seqused_k=torch.tensor([0, 77, 150], dtype=torch.int32))


@FLOATS
def test_gradient_of_the_lse(emulator, dtype):
    q, k, v = random_qkv("cpu", dtype, batch=1, seqlen_q=40, seqlen_k=70, heads_q=2, heads_kv=1, dim=64)
    check(emulator, q, k, v, with_dlse=True, causal=True)


@FLOATS
@pytest.mark.parametrize("dim", [64, 128, 192])
def test_dropout(emulator, dtype, dim):
    """Forward and backward drop what S_dmask shows, and the share dropped is p."""
    p = 0.25
    q, k, v = random_qkv("cpu", dtype, batch=1, seqlen_q=150, seqlen_k=140, heads_q=2, heads_kv=1, dim=dim)
    arguments = {"causal": True, "dropout_p": p}
    seed = torch.tensor([1234567890123, 42])
    problem = Problem(q, k, v, **arguments, rng_state=seed, want_dmask=True)
    out, _, s_dmask = emulator.forward(problem)
    keep = ~torch.signbit(s_dmask)
    seen = torch.ones(150, 140, dtype=torch.bool).tril(140 - 150).expand_as(keep)
    share = 1.0 - float(keep[seen].float().mean())
    assert abs(share - p) < 6.0 * (p * (1.0 - p) / int(seen.sum())) ** 0.5  # six standard deviations

    expected = exact(q, k, v, **arguments, dropout_mask=keep)
    plain = attention_reference(q, k, v, **arguments, dropout_mask=keep)
    assert_accurate(out, plain.out, expected.out)
    assert_accurate(s_dmask.abs(), plain.probabilities.to(dtype), expected.probabilities, "S_dmask")
    check(emulator, q, k, v, {"rng_state": seed}, **arguments, dropout_mask=keep)


@FLOATS
def test_strides(emulator, dtype):
    """q, k and v cut from one packed tensor, and a k whose rows all lie in one place."""
    qkv = torch.randn(2, 50, 3, 2, 64).to(dtype)
    check(emulator, *qkv.unbind(2), causal=True)
    q, _, v = qkv.unbind(2)
    check(emulator, q, torch.randn(2, 1, 2, 64).to(dtype).expand(2, 50, 2, 64), v)


@FLOATS
def test_infinite_keys_stay_in_their_rows(emulator, dtype):
    """A NaN in one key reaches the rows that see it and no other."""
    q, k, v = random_qkv("cpu", dtype, batch=1, seqlen_q=100, seqlen_k=100, heads_q=2, dim=64)
    clean, _, _ = emulator.forward(Problem(q, k, v, causal=True))
    k = k.clone()
    k[0, 70, 1] = torch.nan
    out, _, _ = emulator.forward(Problem(q, k, v, causal=True))
    assert torch.equal(out[0, :70], clean[0, :70]) and torch.equal(out[0, :, 0], clean[0, :, 0])
    assert out[0, 70:, 1].isnan().all()


@FLOATS
@pytest.mark.parametrize("page_size", [64, 192, 300])
@pytest.mark.parametrize(("dim", "arguments"), [(128, {}), (40, {"causal": True}), (64, {"softcap": 2.0})])
def test_pages(emulator, dtype, dim, arguments, page_size):
    """The bits of a contiguous cache: what is in use lies among NaN, and the table ends in anything."""
    lengths = [300, 0, 70]
    pages = -(-max(lengths) // page_size)
    q, *rows = random_qkv("cpu", dtype, batch=3, seqlen_q=5, seqlen_k=pages * page_size, heads_q=4, heads_kv=2, dim=dim)
    places = torch.randperm(4 * pages)[: 3 * pages].view(3, pages).int()
    used = torch.tensor(lengths, dtype=torch.int32)
    pools = [torch.full((4 * pages, page_size, 2, dim), torch.nan, dtype=dtype) for _ in rows]
    for b, length in enumerate(lengths):
        for cache, pool in zip(rows, pools, strict=True):
            cache[b, length:] = torch.nan
            pool[places[b].long()] = cache[b].view(pages, page_size, 2, dim)
        places[b, -(-length // page_size) :] = [10**6, -1, -(10**9)][b]
    expected = emulator.forward(Problem(q, *rows, seqused_k=used, **arguments))
    found = emulator.forward(Problem(q, *pools, seqused_k=used, block_table=places, **arguments))
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])
    assert not found[0].isnan().any()


@FLOATS
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "pairs"), [(64, 32), (64, 20), (33, 16)])
def test_append(emulator, dtype, dim, pairs, interleaved):
    """Rotated rows in pages, behind what they hold; nothing beside them, nor where there is no page."""
    q, k, v = random_qkv("cpu", dtype, batch=3, seqlen_q=5, seqlen_k=5, heads_q=4, heads_kv=2, dim=dim)
    caches = tuple(torch.zeros(9, 8, 2, dim, dtype=dtype) for _ in "kv")
    table = torch.tensor([[4, 0, 7], [8, 1, 2], [5, 10**6, -1]], dtype=torch.int32)
    lengths = torch.tensor([0, 19, 6], dtype=torch.int32)
    angle = torch.rand(24, pairs) * 6.0
    for tables in ((angle.cos(), angle.sin()), (angle.cos().to(dtype), angle.sin().to(dtype))):
        for cache in caches:
            cache.zero_()
        rotated, after = emulator.append(q, k, v, caches, lengths, table, tables, interleaved)
        assert after.tolist() == [5, 24, 11]
        turned = [apply_rotary(x, *tables, seqlen_offsets=lengths, interleaved=interleaved) for x in (q, k)]
        assert torch.equal(rotated, turned[0])
        for cache, new in zip(caches, (turned[1], v), strict=True):
            expected = torch.zeros_like(cache)
            expected[4, :5], expected[2, 3:], expected[5, 6:] = new[0], new[1], new[2, :2]
            assert torch.equal(cache, expected)


@FLOATS
def test_append_without_pages_or_tables(emulator, dtype):
    q, k, v = random_qkv("cpu", dtype, batch=2, seqlen_q=3, seqlen_k=3, heads_q=2, heads_kv=2, dim=64)
    caches = tuple(torch.zeros(2, 7, 2, 64, dtype=dtype) for _ in "kv")
    rotated, after = emulator.append(q, k, v, caches, torch.tensor([4, 0], dtype=torch.int32))
    assert rotated.isnan().all() and after.tolist() == [7, 3]
    for cache, new in zip(caches, (k, v), strict=True):
        assert torch.equal(cache[0, 4:], new[0]) and torch.equal(cache[1, :3], new[1])
        assert not cache[0, :4].any() and not cache[1, 3:].any()

"""The guarantees of docs/numerics.md, bit for bit, on the gfx90a machine code."""

import pytest
import torch
from emulator import DTYPES, Problem
from helpers import cumulative, random_qkv

FLOATS = pytest.mark.parametrize("dtype", list(DTYPES), ids=DTYPES.values())
DIMS = pytest.mark.parametrize("dim", [64, 128, 192])


def split_of(emulator, dtype, dim) -> int:
    """The smallest split_size: one key block."""
    return emulator.find("Forward", dtype, dim).info.block_n


@FLOATS
@DIMS
def test_chunked_prefill_and_decode_equal_the_whole(emulator, dtype, dim):
    """Rows of a whole prefill, of two chunk sizes and one at a time, each against the keys up to its end."""
    length, split = 200, 2 * split_of(emulator, dtype, dim)
    q, k, v = random_qkv("cpu", dtype, 1, length, heads_q=2, heads_kv=1, dim=dim)
    whole, whole_lse, _ = emulator.forward(Problem(q, k, v, causal=True, split_size=split))
    ends = [(0, 130), (130, 200), (0, 77), (77, 150), *((i, i + 1) for i in (0, 63, 64, 127, 128, 199))]
    for begin, end in ends:
        problem = Problem(q[:, begin:end], k[:, :end], v[:, :end], causal=True, split_size=split)
        out, lse, _ = emulator.forward(problem)
        assert torch.equal(out, whole[:, begin:end]), (begin, end)
        assert torch.equal(lse, whole_lse[:, :, begin:end]), (begin, end)


@FLOATS
@DIMS
def test_one_block_folds_like_many(emulator, dtype, dim):
    """All chunks in one block, and one block a chunk with the combine kernel."""
    split = split_of(emulator, dtype, dim)
    q, k, v = random_qkv("cpu", dtype, 1, 40, 170, heads_q=2, heads_kv=1, dim=dim)
    sink = torch.randn(2)
    folded = emulator.forward(Problem(q, k, v, causal=True, s_aux=sink, split_size=split))
    many = Problem(q, k, v, causal=True, s_aux=sink, split_size=split, num_splits=-(-170 // split))
    combined = emulator.forward(many)
    assert torch.equal(folded[0], combined[0]) and torch.equal(folded[1], combined[1])


@FLOATS
def test_forward_does_not_depend_on_the_batch(emulator, dtype):
    """Three sequences padded together, packed together, alone, and with half of the heads."""
    q, k, v = random_qkv("cpu", dtype, 3, 70, 90, heads_q=4, heads_kv=2, dim=64)
    out, lse, _ = emulator.forward(Problem(q, k, v, causal=True))
    where = {"cu_seqlens_q": cumulative([70] * 3, "cpu"), "cu_seqlens_k": cumulative([90] * 3, "cpu")}
    packed = Problem(*(x.flatten(0, 1) for x in (q, k, v)), causal=True, max_seqlen_q=70, max_seqlen_k=90, **where)
    packed_out, packed_lse, _ = emulator.forward(packed)
    assert torch.equal(packed_out, out.flatten(0, 1))
    assert torch.equal(packed_lse, lse.transpose(0, 1).flatten(1))
    for b in range(3):
        alone, alone_lse, _ = emulator.forward(Problem(q[b : b + 1], k[b : b + 1], v[b : b + 1], causal=True))
        assert torch.equal(alone[0], out[b]) and torch.equal(alone_lse[0], lse[b])
    half, _, _ = emulator.forward(Problem(q[:, :, :2], k[:, :, :1], v[:, :, :1], causal=True))
    assert torch.equal(half, out[:, :, :2])


@FLOATS
def test_deterministic_backward_does_not_depend_on_the_batch(emulator, dtype):
    """Blocks of keys add to dQ in turns: with several of them the order shows in the bits."""
    q, k, v = random_qkv("cpu", dtype, 2, 70, 300, heads_q=2, heads_kv=1, dim=64)
    dout = torch.randn(q.shape).to(dtype)
    problem = Problem(q, k, v, causal=True)
    out, lse, _ = emulator.forward(problem)
    together = emulator.backward(problem, dout, out, lse, deterministic=True)
    for b in range(2):
        one = slice(b, b + 1)
        alone = emulator.backward(
            Problem(q[one], k[one], v[one], causal=True), dout[one], out[one], lse[one], deterministic=True
        )
        assert all(torch.equal(x[0], y[b]) for x, y in zip(alone, together, strict=True))


@FLOATS
def test_unaligned_inputs_give_the_same_bits(emulator, dtype):
    """The element-wise path of the loads, against 16-byte access."""
    q, k, v = random_qkv("cpu", dtype, 1, 70, 90, heads_q=2, heads_kv=1, dim=64)
    shifted = [torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x) for x in (q, k, v)]
    aligned, unaligned = Problem(q, k, v, causal=True), Problem(*shifted, causal=True)
    assert aligned.is_aligned and not unaligned.is_aligned
    expected, out = emulator.forward(aligned), emulator.forward(unaligned)
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1], expected[1])
    dout = torch.randn(q.shape).to(dtype)
    wanted = emulator.backward(aligned, dout, *expected[:2])
    found = emulator.backward(unaligned, dout, *expected[:2])
    assert all(torch.equal(x, y) for x, y in zip(found, wanted, strict=True))

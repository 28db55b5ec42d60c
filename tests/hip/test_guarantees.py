"""The three guarantees on gfx90a, in both modes, by comparing bits: runs, batches, packing, chunks, decoding."""

import pytest
import torch
from emulator import Problem
from helpers import feature, longest, random_packed, random_qkv

KINDS = [
    pytest.param(dtype, performance, id=name + ("-performance" if performance else ""))
    for dtype, name in ((torch.float16, "fp16"), (torch.bfloat16, "bf16"), (torch.float32, "fp32"))
    for performance in ((False, True) if dtype.itemsize == 2 else (False,))
]
EVERY_KIND = pytest.mark.parametrize(("dtype", "performance"), KINDS)
SPLIT = 64  # keys: one to four key blocks


@pytest.fixture
def differentiate(emulator):
    """(out, lse, dq, dk, dv) with the deterministic mode."""

    def call(q, k, v, dout, **arguments):
        problem = Problem(q, k, v, **arguments)
        out, lse, _ = emulator.forward(problem)
        return out, lse, *emulator.backward(problem, dout, out, lse, deterministic=True)

    return call


@pytest.fixture
def attend(emulator):
    """(out, lse) of causal attention, schedule-invariant."""

    def call(q, k, v, split_size=SPLIT, **arguments):
        return emulator.forward(Problem(q, k, v, causal=True, split_size=split_size, **arguments))[:2]

    return call


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def draw(dtype, batch, seqlen_q, seqlen_k, dim=64):
    q, k, v = random_qkv("cpu", dtype, batch, seqlen_q, seqlen_k, heads_q=4, heads_kv=2, dim=dim)
    return q, k, v, torch.randn(q.shape).to(dtype)


@EVERY_KIND
@pytest.mark.parametrize("name", ["causal", "everything"])
def test_runs_and_batches_do_not_matter(differentiate, dtype, performance, name):
    """Again; four sequences in twos and alone. Keys in several blocks, so that their additions to dQ take turns."""
    inputs = draw(dtype, 4, 40, 150)
    arguments = {**feature(name, inputs[0]), "performance_mode": performance}
    whole = differentiate(*inputs, **arguments)
    assert same(whole, differentiate(*inputs, **arguments))
    for size in (2, 1):
        parts = [differentiate(*(x[b : b + size] for x in inputs), **arguments) for b in range(0, 4, size)]
        assert same(whole, [torch.cat(column) for column in zip(*parts, strict=True)])


@EVERY_KIND
def test_heads_do_not_matter(differentiate, dtype, performance):
    inputs = draw(dtype, 1, 40, 150)
    out, lse, dq, dk, dv = differentiate(*inputs, causal=True, performance_mode=performance)
    for head in range(2):
        queries, keys = slice(2 * head, 2 * head + 2), slice(head, head + 1)
        spans = (queries, keys, keys, queries)
        mine = (x[:, :, span] for x, span in zip(inputs, spans, strict=True))
        alone = differentiate(*mine, causal=True, performance_mode=performance)
        expected = (out[:, :, queries], lse[:, queries], dq[:, :, queries], dk[:, :, keys], dv[:, :, keys])
        assert same(alone, expected)


@EVERY_KIND
def test_packing_does_not_matter(differentiate, dtype, performance):
    lengths_q, lengths_k = [5, 70], [131, 40]
    q, k, v, where = random_packed("cpu", dtype, lengths_q, lengths_k, dim=64)
    dout = torch.randn(q.shape).to(dtype)
    arguments = {"causal": True, "performance_mode": performance}
    packed = differentiate(q, k, v, dout, **arguments, **where, **longest(lengths_q, lengths_k))
    for row, key, rows, keys in zip((0, 5), (0, 131), lengths_q, lengths_k, strict=True):
        queries, values = slice(row, row + rows), slice(key, key + keys)
        spans = (queries, values, values, queries)
        mine = (x[None, span] for x, span in zip((q, k, v, dout), spans, strict=True))
        alone = differentiate(*mine, **arguments)
        expected = (packed[0][queries], packed[1][:, queries], packed[2][queries], packed[3][values], packed[4][values])
        assert same([x[0] for x in alone], expected)


@EVERY_KIND
@pytest.mark.parametrize("dim", [64, 128, 192])
def test_schedules_do_not_matter(attend, dtype, performance, dim):
    """A whole prefill by one block a row, by a block for each chunk of keys, in chunks of queries, and row by row."""
    q, k, v, _ = draw(dtype, 1, 200, 200, dim)
    whole = attend(q, k, v, performance_mode=performance)
    sink = torch.randn(4)
    for arguments in ({}, {"s_aux": sink}):
        folded, combined = (attend(q, k, v, performance_mode=performance, num_splits=n, **arguments) for n in (1, 4))
        assert same(folded, combined)
    assert not torch.equal(whole[0], attend(q, k, v, performance_mode=performance, split_size=2 * SPLIT)[0])
    for size in (64, 77):
        ends = [*range(size, 200, size), 200]
        parts = [
            attend(q[:, begin:end], k[:, :end], v[:, :end], performance_mode=performance)
            for begin, end in zip([0, *ends[:-1]], ends, strict=True)
        ]
        outs, lses = zip(*parts, strict=True)
        assert same(whole, (torch.cat(outs, 1), torch.cat(lses, 2)))
    for row in (0, 62, 63, 64, 128, 171, 199):
        for splits in (1, row // SPLIT + 1):
            end = row + 1
            decoded = attend(q[:, row:end], k[:, :end], v[:, :end], performance_mode=performance, num_splits=splits)
            assert same(decoded, (whole[0][:, row:end], whole[1][:, :, row:end]))


@EVERY_KIND
def test_a_cache_s_unused_keys_do_not_matter(attend, dtype, performance):
    """One query against a cache: what lies behind its length is not looked at."""
    q, k, v, _ = draw(dtype, 1, 200, 200)
    out, lse = attend(q, k, v, performance_mode=performance)
    k, v = (torch.cat([x[:, :172], torch.full_like(x, torch.nan)], 1) for x in (k, v))
    used = torch.tensor([172], dtype=torch.int32)
    decoded = attend(q[:, 171:172], k, v, seqused_k=used, performance_mode=performance)
    assert same(decoded, (out[:, 171:172], lse[:, :, 171:172]))


@EVERY_KIND
def test_alignment_does_not_matter(differentiate, dtype, performance):
    """Loads of 16 bytes, and element by element."""
    inputs = draw(dtype, 1, 70, 90)
    shifted = [torch.empty(x.numel() + 1, dtype=dtype)[1:].view(x.shape).copy_(x) for x in inputs]
    assert Problem(*inputs[:3]).is_aligned and not Problem(*shifted[:3]).is_aligned
    arguments = {"causal": True, "performance_mode": performance}
    assert same(differentiate(*inputs, **arguments), differentiate(*shifted, **arguments))

"""The performance mode on gfx90a: accuracy, that it is on, its guarantees, and what it does to small gradients.

The emulator flushes the denormals of 16-bit factors, as MI200's matrix instructions do.
"""

import performance_mode as mode
import pytest
import torch
from emulator import Problem
from helpers import FEATURES, feature, longest, random_packed, random_qkv

BITS_16 = pytest.mark.parametrize("dtype", mode.DTYPES, ids=["fp16", "bf16"])


@pytest.fixture
def run(emulator):
    def call(performance, q, k, v, dout, *, keep=None, deterministic=False, **arguments):
        problem = Problem(q, k, v, performance_mode=performance, **arguments)
        out, lse, _ = emulator.forward(problem)
        return mode.Results(out, lse, *emulator.backward(problem, dout, out, lse, deterministic=deterministic))

    return call


def check(run, q, k, v, **arguments):
    dout = torch.randn(q.shape).to(q.dtype)
    mode.assert_accurate(run(True, q, k, v, dout, **arguments), q, k, v, dout, **arguments)


@BITS_16
@pytest.mark.parametrize("dim", [32, 64, 96, 128, 192, 256])
def test_head_dims(run, dtype, dim):
    q, k, v = random_qkv("cpu", dtype, batch=1, seqlen_q=150, seqlen_k=203, heads_q=2, heads_kv=1, dim=dim)
    check(run, q, k, v, causal=True)


@BITS_16
@pytest.mark.parametrize("name", FEATURES)
def test_features(run, dtype, name):
    q, k, v = random_qkv("cpu", dtype, batch=2, seqlen_q=45, seqlen_k=70, heads_q=4, heads_kv=2, dim=64)
    check(run, q, k, v, **feature(name, q))


@BITS_16
@pytest.mark.parametrize("dim", [1, 40, 133])
def test_any_head_dim(run, dtype, dim):
    q, k, v = random_qkv("cpu", dtype, 1, 40, 50, heads_q=2, heads_kv=1, dim=dim)
    check(run, q, k, v, causal=True)


@BITS_16
@pytest.mark.parametrize("dim", [64, 192])
def test_dropout(emulator, run, dtype, dim):
    q, k, v = random_qkv("cpu", dtype, batch=1, seqlen_q=70, seqlen_k=140, heads_q=2, heads_kv=1, dim=dim)
    arguments = {"dropout_p": 0.25, "rng_state": torch.tensor([1234567890123, 42])}
    _, _, s_dmask = emulator.forward(Problem(q, k, v, **arguments, want_dmask=True, performance_mode=True))
    dout = torch.randn(q.shape).to(dtype)
    found = run(True, q, k, v, dout, **arguments)
    mode.assert_accurate(found, q, k, v, dout, ~torch.signbit(s_dmask), dropout_p=0.25)


def test_fp16_is_multiplied_in_bf16(run):
    mode.check_fp16_is_multiplied_in_bf16(run)


def test_inputs_are_rounded_to_nearest(run):
    mode.check_inputs_are_rounded_to_nearest(run)


def test_nans_stay(run):
    """Quiet ones: converting signalling ones to fp32 makes them quiet on the machine, but not in the emulator."""
    mode.check_nans_stay(run)


def test_large_gradients(run):
    mode.check_large_gradients(run)


@BITS_16
def test_p_is_truncated(run, dtype):
    mode.check_p_is_truncated(run, dtype)


@BITS_16
def test_p_and_ds_are_truncated_in_the_backward(run, dtype):
    mode.check_backward_is_truncated(run, dtype)


def test_small_gradients(run):
    """fp16's denormals, flushed, take ever more of the gradient; in bf16 they are normal numbers. docs/numerics.md."""
    errors = {}
    for exponent in (-4, -10, -20):
        torch.manual_seed(0)
        inputs = mode.small_gradients(exponent)
        for performance in (False, True):
            errors[exponent, performance] = mode.relative_error(run(performance, *inputs).dq, *inputs)
    assert errors[-4, False] < 0.01 and errors[-10, False] > 0.05 and errors[-20, False] > 0.9
    assert all(error < 0.01 for (_, performance), error in errors.items() if performance)


def same(first, second):
    return all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@BITS_16
def test_batch_does_not_matter(run, dtype):
    q, k, v = random_qkv("cpu", dtype, batch=2, seqlen_q=70, seqlen_k=150, heads_q=2, heads_kv=1, dim=64)
    dout = torch.randn(q.shape).to(dtype)
    whole = run(True, q, k, v, dout, causal=True, deterministic=True)
    assert same(whole, run(True, q, k, v, dout, causal=True, deterministic=True))
    parts = [run(True, *(x[b : b + 1] for x in (q, k, v, dout)), causal=True, deterministic=True) for b in range(2)]
    assert same(whole, [torch.cat(column) for column in zip(*parts, strict=True)])


@BITS_16
def test_packing_does_not_matter(run, dtype):
    lengths_q, lengths_k = [5, 130], [131, 40]
    q, k, v, where = random_packed("cpu", dtype, lengths_q, lengths_k, dim=64)
    dout = torch.randn(q.shape).to(dtype)
    packed = run(True, q, k, v, dout, deterministic=True, **where, **longest(lengths_q, lengths_k))
    begin_q = begin_k = 0
    for rows, keys in zip(lengths_q, lengths_k, strict=True):
        mine, theirs = slice(begin_q, begin_q + rows), slice(begin_k, begin_k + keys)
        spans = (mine, theirs, theirs, mine)
        alone = run(True, *(x[None, span] for x, span in zip((q, k, v, dout), spans, strict=True)), deterministic=True)
        expected = (packed.out[mine], packed.lse[:, mine], packed.dq[mine], packed.dk[theirs], packed.dv[theirs])
        assert same([x[0] for x in alone], expected)
        begin_q, begin_k = begin_q + rows, begin_k + keys


@BITS_16
def test_schedule_does_not_matter(emulator, dtype):
    """One block that folds its chunks, a block for each chunk, and decoding one row."""
    q, k, v = random_qkv("cpu", dtype, batch=1, seqlen_q=40, seqlen_k=200, heads_q=2, heads_kv=1, dim=64)

    def attend(q, k, v, num_splits):
        return emulator.forward(
            Problem(q, k, v, causal=True, split_size=64, num_splits=num_splits, performance_mode=True)
        )[:2]

    out, lse = attend(q, k, v, 1)
    assert same((out, lse), attend(q, k, v, 4))
    row = attend(q[:, 10:11], k[:, :171], v[:, :171], 1)
    assert same(row, (out[:, 10:11], lse[:, :, 10:11]))

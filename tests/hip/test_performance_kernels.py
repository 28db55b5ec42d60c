"""The performance mode on gfx90a: accuracy, that it is on, and what it does to small gradients.

The emulator flushes the denormals of 16-bit factors, as MI200's matrix instructions do.
"""

import performance_mode as mode
import pytest
import torch
from emulator import Problem
from helpers import FEATURES, feature, random_qkv

BITS_16 = pytest.mark.parametrize("dtype", mode.DTYPES, ids=["fp16", "bf16"])


@pytest.fixture
def run(emulator):
    def call(performance, q, k, v, dout, **arguments):
        problem = Problem(q, k, v, performance_mode=performance, **arguments)
        out, lse, _ = emulator.forward(problem)
        return mode.Results(out, lse, *emulator.backward(problem, dout, out, lse))

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
